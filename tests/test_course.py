"""What notebooks written against the 2022 course rely on, by the numbers of the list that was made of it.

1 events: test_learner (cancels), here (lr_find's plot). 2 order of callbacks: test_learner. 3 steps: here. 4 cancels: test_learner.
5 callbacks of one fit: test_learner, test_reliability, test_activations, here. 6 optimizers: test_learner, here. 7 to 10: here.
11 summary: test_augment. 12 patched methods: test_augment, here. 13 layers by index, pickles: test_resnet. 14 two functions conv: here.
15 star imports: test_api, test_imports. 16 mixed precision: here, test_accel.
"""
from functools import partial

import matplotlib.pyplot as plt
import numpy as np, pytest, torch
import torch.nn.functional as F
from datasets import Dataset as HFDataset, DatasetDict
from fastcore.basics import noop
from fastcore.foundation import L
from helpers import RaiseCB, Recorder, images, weights
from PIL import Image
from torch import nn

import miniai.augment # noqa: F401  patches Learner
import miniai.conv, miniai.init
from miniai.accel import AccelerateCB, MixedPrecision
from miniai.activations import set_seed
from miniai.conv import collate_device, to_device
from miniai.datasets import DataLoaders, collate_dict, get_dls, inplace, show_image, show_images
from miniai.init import BatchTransformCB, GeneralRelu, get_model
from miniai.learner import Callback, DeviceCB, Learner, LRFinderCB, MetricsCB, MomentumLearner, ProgressCB, TrainCB, TrainLearner, to_cpu

# 1
def test_01_lr_find_plots_although_its_fit_was_cancelled(model, dls):
    TrainLearner(model, dls, cbs=(rec := Recorder())).fit(10, lr=1e-5, cbs=LRFinderCB())
    assert 'after_fit' not in rec.seen and rec.seen[-1] == 'cleanup_fit'
    ax = plt.gcf().axes[0]
    assert ax.get_xscale() == 'log' and len(ax.lines[0].get_xdata()) > 5

# 3
def test_03_train_cb_beside_a_train_learner_is_silent_and_others_supply_the_steps(model, dls):
    class Boom(TrainCB):
        def predict(self, learn): raise AssertionError
    TrainLearner(model, dls, cbs=Boom()).fit(1)
    with pytest.raises(AssertionError): Learner(model, dls, cbs=Boom()).fit(1)
    class Double(TrainCB):
        def predict(self, learn): learn.preds = 2*learn.model(learn.batch[0])
    learn = Learner(model, dls, cbs=Double())
    learn.fit(1, train=False)
    assert torch.equal(learn.preds, 2*model(learn.batch[0]))

# 5
def test_05_callbacks_of_one_fit_as_l_and_shared_between_learners(model, dls):
    cbs,xtra = L(TrainCB()),L(DeviceCB('cpu'), MetricsCB())
    for _ in range(2):
        learn = Learner(model, dls, cbs=cbs+xtra)
        learn.fit(1, cbs=L(rec := Recorder()))
        assert rec.seen[-1] == 'cleanup_fit' and rec not in learn.cbs and len(learn.cbs) == 3
    with pytest.raises(ValueError): learn.fit(1, cbs=[Recorder(), RaiseCB('after_loss', ValueError())])
    assert len(learn.cbs) == 3

# 6
def test_06_no_optimizer_and_no_learning_rate(model, dls):
    learn = TrainLearner(model, dls, opt_func=None)
    learn.fit(1, train=False)
    assert learn.opt is None
    learn = MomentumLearner(model, dls, F.mse_loss)
    with pytest.raises(ValueError, match='no learning rate'): learn.fit(1)
    learn.fit(1, lr=.01)

# 7
def test_07_batches_are_any_sequence_and_inputs_may_be_tuples():
    class XT(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(3, 1)
        def forward(self, xt): return self.lin(xt[0])*xt[1]
    batches = [[(torch.randn(n, 3), torch.ones(n, 1)), torch.zeros(n, 1)] for n in (7, 2)]
    metrics = MetricsCB()
    learn = Learner(XT(), DataLoaders(batches, batches), F.mse_loss, cbs=[TrainCB(), DeviceCB('cpu'), metrics])
    learn.fit(1, train=False)
    whole = torch.cat([learn.model(xt) for xt,_ in batches])
    assert float(metrics.loss.compute()) == pytest.approx((whole**2).mean().item())

@pytest.mark.parametrize('f', [to_cpu, partial(to_device, device='cpu')])
def test_07_moving_goes_through_dicts_lists_and_tuples(f):
    res = f(dict(a=[torch.ones(1), (torch.zeros(2), 'x')], b=3))
    assert isinstance(res['a'], list) and isinstance(res['a'][1], tuple) and res['a'][1][1] == 'x' and res['b'] == 3
    assert to_cpu([torch.ones(1, dtype=torch.float16)])[0].dtype == torch.float32
    assert len(collate_device([(torch.ones(2), 1)]*3)[0]) == 3

# 8
def rows(n): return dict(b=list(range(n)), a=[[float(i)]*2 for i in range(n)])

def test_08_loaders_from_a_dataset_dict():
    dd = DatasetDict(second=HFDataset.from_dict(rows(10)), first=HFDataset.from_dict(rows(20)), third=HFDataset.from_dict(rows(5)))
    dls = DataLoaders.from_dd(dd, 4, num_workers=0, drop_last=True)
    assert (len(dls.train.dataset), len(dls.valid.dataset)) == (10, 20) # in the order of dd.values()
    assert (dls.train.batch_size, dls.valid.batch_size, len(dls.train), len(dls.valid)) == (4, 8, 2, 3) # but drop_last is for training
    b,a = next(iter(dls.valid)) # a tuple in the order of the features
    assert b.tolist() == list(range(8)) and a[0].tolist() == a[1].tolist() == list(range(8))
    assert set(next(iter(DataLoaders.from_dd(dd, 4, as_tuple=False).train))) == {'a', 'b'}

def test_08_any_two_iterables_will_do(model):
    batch = torch.randn(4, 4),torch.randn(4, 1)
    dls = DataLoaders([], [batch])
    TrainLearner(model, dls).fit(1, train=False)
    dls.train = [batch]*2 # anything with a length
    TrainLearner(model, dls, cbs=ProgressCB()).fit(1)

# 9
@inplace
def double_(b): b['x'] = [2*o for o in b['x']]

def test_09_inplace_and_collate_dict():
    b = dict(x=[1, 2])
    assert double_(b) is b and b['x'] == [2, 4]
    ds = HFDataset.from_dict(dict(y=[1, 2], x=[.5, .25]))
    y,x = collate_dict(ds)([ds[0], ds[1]])
    assert y.tolist() == [1, 2] and x.tolist() == [.5, .25]

@pytest.mark.parametrize('start', ['spawn', 'forkserver'])
def test_09_both_reach_loader_workers_that_are_not_forked(start):
    ds = HFDataset.from_dict(dict(x=[1., 2., 3.], y=[0, 1, 2])).with_transform(double_)
    train,_ = get_dls(ds, ds, 2, num_workers=1, collate_fn=collate_dict(ds), multiprocessing_context=start)
    assert sorted(o for x,_ in train for o in x.tolist()) == [2., 4., 6.]

# 10
@pytest.mark.parametrize('kw,size', [(dict(imsize=2), (4, 4)), (dict(figsize=(3,1)), (3, 1)), (dict(suptitle='s'), (6, 6)),
                                     (dict(title='t'), (6, 6))])
def test_10_show_images_passes_its_arguments_on(kw, size):
    ims = [torch.rand(1, 4, 4), torch.rand(3, 4, 4), torch.rand(4, 4), Image.fromarray(np.zeros((4, 4), np.uint8))]
    show_images(ims, titles=['one', 'two'], **kw)
    fig = plt.gcf()
    assert tuple(fig.get_size_inches()) == size and fig.get_suptitle() == kw.get('suptitle', kw.get('title', ''))
    assert [ax.get_title() for ax in fig.axes] == ['one', 'two', '', '']

def test_10_show_image_returns_its_axes_and_passes_on_to_imshow():
    ax = show_image(torch.rand(4, 4), animated=True, origin='lower')
    assert isinstance(ax, plt.Axes) and ax.images[0].get_animated() and ax.images[0].origin == 'lower'
    assert show_image(torch.rand(4, 4), ax) is ax

# 12
def test_12_patched_methods_are_those_of_every_learner(model, dls):
    class Mine(TrainLearner): pass
    for nm in ('lr_find', 'summary', 'show_image_batch', 'capture_preds'):
        assert callable(getattr(Mine(model, dls), nm)) and nm in vars(Learner)

# 14
def test_14_two_functions_conv():
    assert isinstance(miniai.conv.conv(1, 2, act=True)[1], nn.ReLU) and isinstance(miniai.conv.conv(1, 2, act=False), nn.Conv2d)
    assert isinstance(miniai.init.conv(1, 2, act=GeneralRelu)[-1], GeneralRelu) and len(miniai.init.conv(1, 2, act=None)) == 1

# 16
@pytest.mark.filterwarnings('ignore:mixed precision is meant for GPUs')
@pytest.mark.parametrize('first', [True, False], ids=['listed first', 'listed last'])
def test_16_mixed_precision(first):
    seen = []
    class Look(Callback):
        order = MixedPrecision.order+1
        def after_predict(self, learn): seen.append((learn.training, learn.preds.dtype, torch.is_autocast_enabled('cpu')))
        def after_loss(self, learn): assert not torch.is_autocast_enabled('cpu')
    mp,others = MixedPrecision(),[DeviceCB('cpu'), MetricsCB(), BatchTransformCB(noop)]
    assert mp.order == DeviceCB.order+10
    set_seed(0)
    cbs = [mp, *others, Look()] if first else [*others, Look(), mp]
    learn = Learner(get_model().cpu(), DataLoaders(images(8), images(16)), F.cross_entropy, cbs=cbs)
    before = weights(learn.model)
    learn.fit(1)
    assert seen == [(True, torch.bfloat16, True), (False, torch.bfloat16, True)] and weights(learn.model).dtype == torch.float32
    assert not torch.equal(before, weights(learn.model))
    learn.lr_find()
    with pytest.raises(ValueError): learn.fit(1, cbs=RaiseCB('after_predict', ValueError()))
    assert not torch.is_autocast_enabled('cpu')

def test_16_mixed_precision_says_that_it_is_slow_on_a_cpu(model, dls):
    with pytest.warns(UserWarning, match='meant for GPUs'): Learner(model, dls, cbs=MixedPrecision()).fit(1)

@pytest.mark.skipif(torch.cuda.is_available(), reason='fp16 is there')
def test_16_accelerate_without_cuda(model, dls):
    with pytest.warns(UserWarning, match='fp16 needs CUDA'): cb = AccelerateCB()
    Learner(model, dls, cbs=cb).fit(1)
    assert cb.acc.mixed_precision == 'no' # the next test says what that gives

def test_16_accelerate_trains_the_same_and_gives_everything_back(model, dls):
    cb = AccelerateCB(mixed_precision='no')
    def trained(*cbs):
        torch.manual_seed(0)
        two = get_dls(list(zip(*dls.train[0])), list(zip(*dls.train[1])), 4)
        learn = Learner(nn.Linear(4, 1), DataLoaders(*two), cbs=[*cbs, MetricsCB()])
        had = learn.model,learn.dls.train,learn.dls.valid
        learn.fit(2)
        assert all(a is b for a,b in zip(had, (learn.model, learn.dls.train, learn.dls.valid)))
        return weights(learn.model)
    for _ in range(2): assert torch.equal(trained(TrainCB(), DeviceCB()), trained(cb))
