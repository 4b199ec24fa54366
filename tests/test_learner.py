"The Learner's contract: events and their order, cancelling, steps, metrics, progress"
import gc, inspect, math, weakref

import pytest, torch
import torch.nn.functional as F
from torch import nn, optim
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy

from miniai.datasets import DataLoaders
from miniai.learner import *
from miniai.training import accuracy
from helpers import RaiseCB, Recorder, weights

@pytest.mark.parametrize('exc,missing', [(CancelBatchException, 'after_batch'), (CancelEpochException, 'after_epoch'),
                                         (CancelFitException, 'after_fit')])
def test_a_cancel_ends_its_own_level(model, dls, exc, missing):
    rec = Recorder()
    Learner(model, dls, cbs=[TrainCB(), rec, RaiseCB('after_loss', exc())]).fit(2)
    level = missing.split('_')[1]
    assert rec.seen.count(f'cleanup_{level}') == rec.seen.count(f'before_{level}')
    assert rec.seen.count(missing) == rec.seen.count(f'before_{level}') - 1
    batches = 2*(11+5)
    expected = {'batch': batches, 'epoch': batches-10, 'fit': 1}[level]
    assert rec.seen.count('before_batch') == expected

def test_cbs_given_to_fit_leave_with_it(model, dls):
    learn = Learner(model, dls, cbs=[TrainCB()])
    for cbs in (Recorder(), [Recorder()], (Recorder(), Recorder()), None):
        learn.fit(1, cbs=cbs)
        assert [type(cb) for cb in learn.cbs] == [TrainCB]

def test_the_callers_list_is_left_alone(model, dls):
    mine = [TrainCB()]
    Learner(model, dls, cbs=mine).fit(1, cbs=Recorder())
    assert len(mine) == 1

def test_equal_callbacks_are_run_in_list_order_and_others_by_order(model, dls):
    said = []
    class Say(Callback):
        def __init__(self, nm, order=0): self.nm,self.order = nm,order
        def before_fit(self, learn): said.append(self.nm)
    Learner(model, dls, cbs=[TrainCB(), Say('c', 1), Say('a'), Say('b')]).fit(1)
    assert said == ['a', 'b', 'c']

def test_methods_are_looked_up_at_each_event(model, dls):
    cb,seen = Callback(),[]
    class Add(Callback):
        def before_epoch(self, learn): cb.after_batch = lambda learn: seen.append(learn.iter)
    Learner(model, dls, cbs=[TrainCB(), cb, Add()]).fit(1, valid=False)
    assert len(seen) == 11

def test_a_callback_that_joins_within_an_epoch_is_heard_from_the_next_one_on(model, dls):
    class Join(Callback):
        def after_batch(self, learn):
            if (learn.epoch, learn.iter) == (0, 3): learn.cbs.append(rec)
    rec = Recorder()
    learn = TrainLearner(model, dls, cbs=Join())
    learn.fit(2, valid=False)
    assert rec.seen.count('after_batch') == 11

def test_outside_a_fit_nothing_is_remembered(model, dls):
    learn,seen = TrainLearner(model, dls),[]
    def cb(nm):
        res = Callback()
        res.my_event = lambda learn: seen.append(nm)
        return res
    for fit in (lambda: None, lambda: learn.fit(1)):
        fit(); seen.clear()
        learn.cbs = [cb('a')]; learn.callback('my_event')
        learn.cbs.append(cb('b')); learn.callback('my_event')
        assert seen == ['a', 'a', 'b']

def test_a_learner_is_freed_when_nobody_holds_it(model, dls):
    learn = TrainLearner(model, dls, cbs=[MetricsCB(), SingleBatchCB()])
    learn.fit(1)
    ref = weakref.ref(learn)
    gc.disable()
    try:
        del learn
        assert ref() is None, 'a cycle keeps model and batch until the garbage collector comes'
    finally: gc.enable()

def test_the_learner_fits_on_one_screen():
    assert len(inspect.getsource(Learner).splitlines()) <= 70

def test_steps_of_a_subclass_win(model, dls):
    class Mine(Learner):
        def predict(self): self.preds = self.model(self.batch[0])*0
    learn = Mine(model, dls, cbs=TrainCB())
    learn.fit(1)
    assert not learn.preds.any()

def test_unknown_attributes_are_errors(model, dls):
    learn = Learner(model, dls)
    assert not hasattr(learn, 'metrics') and not hasattr(learn, 'opt')
    with pytest.raises(AttributeError, match="no attribute 'modle'"): learn.modle

def test_state_while_and_after_fitting(model, dls):
    learn = TrainLearner(model, dls)
    learn.fit(3)
    assert (learn.n_epochs, list(learn.epochs), learn.epoch, learn.iter, learn.training) == (3, [0,1,2], 2, 4, False)
    assert learn.batch[0].shape == (5,4) and learn.preds.shape == (5,1) and learn.loss.ndim == 0

def test_optimizer_is_new_in_each_fit_and_lr_is_for_that_fit(model, dls):
    learn = TrainLearner(model, dls, lr=.5)
    learn.fit(1, lr=.01)
    first = learn.opt
    assert first.param_groups[0]['lr'] == .01
    learn.fit(1)
    assert learn.opt is not first and learn.opt.param_groups[0]['lr'] == .5

def test_an_optimizer_by_hand_needs_only_step_and_zero_grad(model, dls):
    asked = []
    class SGD:
        def __init__(self, params, lr): self.params,self.lr = list(params),lr
        def step(self):
            asked.append('step')
            with torch.no_grad():
                for p in self.params: p -= self.lr*p.grad
        def zero_grad(self):
            asked.append('zero_grad')
            for p in self.params: p.grad.zero_() # there is nothing to zero before a backward
    start = {k: v.clone() for k,v in model.state_dict().items()}
    TrainLearner(model, dls, opt_func=SGD).fit(2)
    assert asked == ['step', 'zero_grad']*22
    theirs = nn.Linear(4, 1)
    theirs.load_state_dict(start)
    TrainLearner(theirs, dls).fit(2)
    assert torch.allclose(weights(model), weights(theirs))

def test_without_an_optimizer_one_can_still_evaluate(dls):
    metrics = MetricsCB()
    learn = Learner(nn.Identity(), dls, lambda p,t: p, cbs=[TrainCB(), metrics], opt_func=None)
    learn.fit(1, train=False)
    assert learn.opt is None and math.isfinite(metrics.loss.compute())

def test_train_only_valid_only(model, dls):
    rec = Recorder()
    learn = TrainLearner(model, dls, cbs=rec)
    learn.fit(1, valid=False); assert rec.seen.count('before_batch') == 11 and rec.seen.count('after_step') == 11
    before,rec.seen = weights(model),[]
    learn.fit(1, train=False); assert rec.seen.count('before_batch') == 5 and rec.seen.count('after_step') == 0
    assert torch.equal(before, weights(model))

def test_several_inputs(dls):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(4, 1)
        def forward(self, a, b): return self.lin(a+b)
    data = DataLoaders([(x, x, y) for x,y in dls.train], [(x, x, y) for x,y in dls.valid])
    learn = Learner(Two(), data, cbs=TrainCB(n_inp=2))
    learn.fit(1)
    assert learn.preds.shape == (5, 1)

def test_batches_may_be_dicts_to_device_and_a_callback_may_repack_them(model, dls):
    class Unpack(Callback):
        order = DeviceCB.order+1
        def before_batch(self, learn): learn.batch = learn.batch['x'],learn.batch['y']
    data = DataLoaders([dict(x=x, y=y) for x,y in dls.train], [dict(x=x, y=y) for x,y in dls.valid])
    learn = TrainLearner(model, data, cbs=[DeviceCB('cpu'), Unpack()])
    learn.fit(1)
    assert len(learn.batch) == 2

@pytest.mark.parametrize('sizes', [[7], [8,8,1], [3,5,2,9]])
def test_metrics_are_those_of_the_whole_set(sizes):
    torch.manual_seed(0)
    xs,ys = torch.randn(sum(sizes), 6),torch.randint(0, 3, (sum(sizes),))
    model = nn.Linear(6, 3)
    metrics = MetricsCB(accuracy, tm=MulticlassAccuracy(num_classes=3, average='micro'))
    valid = list(zip(xs.split(sizes), ys.split(sizes)))
    Learner(model, DataLoaders([], valid), F.cross_entropy, cbs=[TrainCB(), metrics]).fit(1, train=False)
    with torch.no_grad(): preds = model(xs)
    got = {k: float(m.compute()) for k,m in metrics.all_metrics.items()}
    assert got['loss'] == pytest.approx(F.cross_entropy(preds, ys).item(), rel=1e-5)
    assert got['accuracy'] == pytest.approx(accuracy(preds, ys).item()) == pytest.approx(got['tm'])

def test_metrics_compare_with_what_comes_after_the_inputs():
    torch.manual_seed(0)
    a,b,y = torch.randn(50, 4),torch.randint(0, 3, (50,)),torch.randint(0, 3, (50,))
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.lin,self.emb = nn.Linear(4, 3),nn.Embedding(3, 3)
        def forward(self, a, b): return self.lin(a)+self.emb(b)
    metrics = MetricsCB(accuracy)
    learn = Learner(Two(), DataLoaders([], [(a, b, y)]), F.cross_entropy, cbs=[metrics, TrainCB(n_inp=2)])
    learn.fit(1, train=False)
    assert float(metrics.metrics['accuracy'].compute()) == pytest.approx(accuracy(learn.preds, y).item())

def test_stepped_says_what_happened_in_this_batch(model, dls):
    seen = []
    class Look(Callback):
        def after_predict(self, learn): seen.append(learn.stepped)
        def after_batch(self, learn): seen.append((learn.training, learn.stepped))
    learn = TrainLearner(model, DataLoaders(list(dls.train)[:1], list(dls.valid)[:1]), cbs=Look())
    learn.fit(1, train=False)
    learn.fit(1)
    assert seen == [False, (False, False), False, (True, True), False, (False, False)]

def test_metrics_start_anew_each_epoch(model, dls):
    metrics = MetricsCB(mae=MeanAbsoluteError())
    learn = TrainLearner(model, dls, lr=0., cbs=metrics)
    learn.fit(1); one = float(metrics.metrics['mae'].compute())
    learn.fit(3); assert float(metrics.metrics['mae'].compute()) == pytest.approx(one)

def test_progress_and_metrics_make_a_table_of_text(model, dls, capsys):
    TrainLearner(model, dls, cbs=[MetricsCB(mae=MeanAbsoluteError()), ProgressCB(plot=True)]).fit(2)
    lines = [l for l in capsys.readouterr().out.replace('\r', '\n').splitlines() if l.split()[:1] in (['epoch'], ['0'], ['1'])]
    assert lines[0].split() == ['epoch', 'train', 'mae', 'loss']
    assert [l.split()[:2] for l in lines[1:]] == [['0','train'], ['0','eval'], ['1','train'], ['1','eval']]

def test_progress_alone_and_with_a_loader_without_a_length(model, dls):
    class Stream:
        def __init__(self, items): self.items = items
        def __iter__(self): return iter(self.items)
    prog = ProgressCB(plot=True)
    learn = TrainLearner(model, DataLoaders(Stream(dls.train), Stream(dls.valid)), cbs=prog)
    learn.fit(2)
    assert len(prog.losses) == 22 and prog.val_losses == []

def test_shared_callbacks_begin_anew(model, dls):
    shared = [MetricsCB(), ProgressCB(plot=True)]
    for _ in range(2): TrainLearner(model, dls, cbs=shared).fit(1)
    assert len(shared[1].losses) == 11

def test_single_batch_lets_other_callbacks_finish_the_batch(model, dls):
    rec = Recorder()
    Learner(model, dls, cbs=[SingleBatchCB(), TrainCB(), rec]).fit(5)
    assert rec.seen.count('after_batch') == 1 and rec.seen[-1] == 'cleanup_fit'

def test_lr_finder_stops_and_skips_validation(model, dls):
    finder,rec = LRFinderCB(),Recorder()
    TrainLearner(model, dls, cbs=rec).fit(20, lr=1e-5, cbs=finder)
    assert finder.losses[-1] > 3*finder.min or not math.isfinite(finder.losses[-1])
    assert len(finder.lrs) == len(finder.losses) < 20*11
    assert 'after_fit' not in rec.seen

def test_lr_find_puts_the_weights_back_even_after_an_error(model, dls):
    before = weights(model)
    learn = TrainLearner(model, dls)
    learn.lr_find(); assert torch.equal(before, weights(model))
    learn.cbs.append(RaiseCB('after_step', ValueError('oops'), n=3))
    with pytest.raises(ValueError): learn.lr_find()
    assert torch.equal(before, weights(model))

def test_lr_find_leaves_schedulers_out_and_needs_no_validation_data(model, dls):
    from miniai.sgd import BatchSchedCB
    sched = BatchSchedCB(lambda opt: optim.lr_scheduler.OneCycleLR(opt, max_lr=.1, total_steps=4)) # too short for the finder
    class Lrs(Callback):
        def before_fit(self, learn): self.lrs = []
        def after_predict(self, learn): self.lrs.append(learn.opt.param_groups[0]['lr'])
    learn = TrainLearner(model, DataLoaders(dls.train, []), cbs=[sched, lrs := Lrs()])
    learn.lr_find(gamma=2, start_lr=1e-4)
    assert lrs.lrs[:3] == pytest.approx([1e-4, 2e-4, 4e-4]) and learn.cbs == [sched, lrs]

def test_lr_find_leaves_out_what_says_that_it_sets_the_learning_rate_and_nothing_else(model, dls):
    from miniai.sgd import BaseSchedCB, BatchSchedCB, EpochSchedCB
    class HasSched(Recorder): sched = 'the noise of a diffusion model'
    class Warm(Recorder): sets_lr = True
    kept,out = HasSched(),Warm()
    TrainLearner(model, dls, cbs=[kept, out]).lr_find()
    assert 'before_fit' in kept.seen and out.seen == []
    assert BaseSchedCB.sets_lr and BatchSchedCB.sets_lr and EpochSchedCB.sets_lr and not Callback.sets_lr

def test_momentum_learner_has_its_default_and_plain_sgd_as_a_special_case(dls):
    def trained(cls, **kw):
        torch.manual_seed(0)
        learn = cls(nn.Linear(4, 1), dls, F.mse_loss, lr=.01, **kw); learn.fit(1)
        return weights(learn.model)
    assert torch.allclose(trained(MomentumLearner, mom=0), trained(TrainLearner))
    assert not torch.allclose(trained(MomentumLearner), trained(TrainLearner))

def test_a_cancelled_step_keeps_the_gradients():
    "after_step and zero_grad are left out as well, and the batch goes on to its end"
    seen = []
    class Every2(Callback):
        def after_backward(self, learn):
            if learn.iter % 2 == 0: raise CancelStepException
        def after_step(self, learn): seen.append('step')
        def after_batch(self, learn): seen.append((learn.stepped, next(learn.model.parameters()).grad is not None))
    model = torch.nn.Linear(2, 1)
    start = model.weight.detach().clone()
    batch = torch.ones(3, 2),torch.zeros(3, 1)
    Learner(model, DataLoaders([batch]*3, []), cbs=[TrainCB(), Every2()]).fit(1, valid=False)
    assert seen == [(False, True), 'step', (True, False), (False, True)]
    assert not torch.equal(model.weight, start)
