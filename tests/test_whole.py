"A whole training run with everything at once, and metrics of three kinds against the predictions"
from functools import partial

import matplotlib.pyplot as plt
import pytest, torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn, optim
from torcheval.metrics import Mean as TorchevalMean, MulticlassAccuracy as TorchevalAccuracy
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import miniai.augment # noqa: F401  patches Learner
from miniai.activations import ActivationStats, set_seed
from miniai.datasets import DataLoaders, fashion_mnist, inplace
from miniai.init import BatchTransformCB, GeneralRelu, get_model, init_weights
from miniai.learner import DeviceCB, Learner, MetricsCB, ProgressCB, TrainCB, TrainLearner
from miniai.sgd import BatchSchedCB, RecorderCB
from miniai.training import accuracy

@inplace
def to_tensors_(b): b['image'] = [TF.to_tensor(o) for o in b['image']]
def normalize(b): return (b[0]-.286)/.353,b[1]

@pytest.fixture(scope='module')
def dd(): return fashion_mnist().with_transform(to_tensors_)

@pytest.mark.filterwarnings('ignore:Using DRAWN STAND-IN IMAGES')
@pytest.mark.parametrize('num_workers', [0, 2])
def test_one_epoch_of_the_whole_set(dd, num_workers):
    set_seed(42)
    dls = DataLoaders.from_dd(dd, 256, num_workers=num_workers)
    model = get_model(partial(GeneralRelu, leak=.1, sub=.4), norm=nn.BatchNorm2d).apply(partial(init_weights, leaky=.1))
    metrics = MetricsCB(accuracy, tm=MulticlassAccuracy(num_classes=10, average='micro'), f1=MulticlassF1Score(num_classes=10),
                        te=TorchevalAccuracy())
    sched = BatchSchedCB(partial(optim.lr_scheduler.OneCycleLR, max_lr=.02, total_steps=len(dls.train)))
    prog,stats,rec = ProgressCB(plot=True),ActivationStats(lambda m: isinstance(m, GeneralRelu)),RecorderCB(lr=lambda cb: cb.pg['lr'])
    cbs = [DeviceCB(), BatchTransformCB(normalize), TrainCB(), metrics, prog, sched, stats, rec]
    learn = Learner(model, dls, F.cross_entropy, lr=.02, cbs=cbs, opt_func=optim.AdamW)
    learn.fit(1)
    got = {k: float(m.compute()) for k,m in metrics.all_metrics.items()}
    steps = len(dls.train)
    assert len(prog.losses) == len(rec.recs['lr']) == steps and [len(h.stats[0]) for h in stats] == [steps]*4

    preds,targs = learn.capture_preds()
    assert len(preds) == len(dd['test']) and torch.equal(targs, torch.tensor(dd['test'].with_format(None)['label']))
    right = (preds.argmax(1) == targs).float().mean().item()
    for k in ('accuracy', 'tm', 'te'): assert got[k] == pytest.approx(right, abs=1e-6)
    assert got['loss'] == pytest.approx(F.cross_entropy(preds, targs).item(), rel=1e-5)
    guess,f1 = preds.argmax(1),[]
    for c in range(10): # the mean over the classes of 2·hits / (guessed + there)
        f1.append(2*((guess==c) & (targs==c)).sum() / ((guess==c).sum() + (targs==c).sum()))
    assert got['f1'] == pytest.approx(torch.stack(f1).mean().item(), abs=1e-6)
    assert right > .5
    plt.close('all')

def test_a_metric_that_is_fed_by_hand(model, dls):
    "A subclass of torcheval's Mean that adds to its sums"
    class Weighted(TorchevalMean):
        def update(self, preds, targs):
            self.weighted_sum += (preds-targs).abs().sum()
            self.weights += len(targs)
    metrics = MetricsCB(mae=Weighted())
    TrainLearner(model, dls, lr=0., cbs=metrics).fit(1)
    xs,ys = map(torch.cat, zip(*dls.valid))
    with torch.no_grad(): assert float(metrics.metrics['mae'].compute()) == pytest.approx((model(xs)-ys).abs().mean().item())
