"The Learner's contract: events and their order, cancelling, steps, metrics, progress"
import copy, gc, inspect, math, signal, threading, weakref
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt, numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn, optim
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy

from miniai.datasets import DataLoaders, TensorLoader
from miniai.learner import *
from miniai.learner import WrappedDL
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
    learn.cbs.append(RaiseCB('after_backward', ValueError('oops'), n=3))
    with pytest.raises(ValueError): learn.lr_find()
    assert torch.equal(before, weights(model))

def test_lr_find_leaves_schedulers_out_and_needs_no_validation_data(model, dls):
    from miniai.sgd import BatchSchedCB
    sched = BatchSchedCB(lambda opt: optim.lr_scheduler.OneCycleLR(opt, max_lr=.1, total_steps=4)) # too short for the finder
    lrs = []
    class Lrs(Callback):
        def after_predict(self, learn): lrs.append(learn.opt.param_groups[0]['lr'])
    learn = TrainLearner(model, DataLoaders(dls.train, []), cbs=[sched, cb := Lrs()])
    learn.lr_find(gamma=2, start_lr=1e-4)
    assert lrs[:3] == pytest.approx([1e-4, 2e-4, 4e-4]) and learn.cbs == [sched, cb]

@pytest.mark.parametrize('bad', [dict(start_lr=0), dict(gamma=1), dict(gamma=math.nan), dict(gamma=math.inf), dict(max_mult=1)])
def test_what_lr_find_refuses(model, dls, bad):
    with pytest.raises(ValueError, match='must be above'): TrainLearner(model, dls).lr_find(**bad)

def test_lr_find_without_an_optimizer_of_its_own(model, dls):
    with pytest.raises(TypeError, match='an optimizer of PyTorch, not None'): TrainLearner(model, dls, opt_func=None).lr_find()
    made = optim.SGD(model.parameters(), lr=.1)
    with pytest.raises(TypeError, match='opt_func is a SGD object'): TrainLearner(model, dls, opt_func=made).lr_find()

# --- fits aside

class Watch(Callback):
    "Keeps results in its own ways, as a user's recorder would"
    def __init__(self): self.n,self.lrs,self.seen = 0,[],set()
    def after_batch(self, learn): self.n += 1; self.lrs.append(learn.iter); self.seen.add(learn.epoch)

class Counts(Watch):
    "Takes part, and keeps results"
    def before_batch(self, learn): self.n += 1; self.lrs.append(learn.iter)

HELPERS = dict(lr_find=lambda learn: learn.lr_find(), summary=lambda learn: learn.summary(), preds=lambda learn: learn.capture_preds(),
               aside=lambda learn: learn.fit_aside(train=True, opt_func=optim.SGD, lr=1e-9))

def state(learn): return {k: v for k,v in vars(learn).items() if k != '_found'}

@pytest.mark.parametrize('helper', HELPERS)
@pytest.mark.parametrize('when', ['before', 'after', 'within'])
def test_a_helpers_own_fit_leaves_everything_as_it_was(model, dls, helper, when):
    import miniai.augment # noqa: F401
    cbs = [TrainCB(), metrics := MetricsCB(mae=MeanAbsoluteError()), prog := ProgressCB(plot=True), watch := Watch(), counts := Counts()]
    learn = Learner(model, dls, lr=.01, cbs=cbs)
    weight = []
    def look(learn):
        def results(): return copy.deepcopy((vars(watch), counts.n, counts.lrs, getattr(prog, 'losses', None)))
        was = state(learn),weights(model),results()
        HELPERS[helper](learn)
        now = state(learn),weights(model),results()
        assert was[0].keys() == now[0].keys() and all(was[0][k] is now[0][k] for k in was[0])
        if helper != 'aside': assert torch.equal(was[1], now[1])
        assert was[2:] == now[2:]
        weight.append(1)
    class Within(Callback):
        order = 200
        def after_batch(self, learn):
            if learn.iter == 2 and learn.epoch == 1: look(learn)
    if when != 'before': learn.fit(2, cbs=Within() if when == 'within' else None)
    if when != 'within': look(learn)
    assert weight and learn.cbs == cbs
    if when != 'before': assert len(prog.losses) == 22 and math.isfinite(metrics.loss.compute()) and metrics.loss.weights == 69

def test_a_look_in_the_middle_does_not_change_where_the_fit_ends(model, dls):
    import miniai.augment # noqa: F401
    def ended(cb=None):
        m = nn.Linear(4, 1)
        m.load_state_dict(start)
        learn = Learner(m, dls, lr=.01, cbs=TrainCB(), opt_func=optim.Adam)
        learn.fit(3, cbs=cb)
        return weights(m),learn.opt.param_groups[0]['lr']
    class Look(Callback):
        def after_backward(self, learn): learn.capture_preds(); learn.lr_find(); plt.close() # gradients are there, and are to stay
        def after_epoch(self, learn): learn.summary()
    start = {k: v.clone() for k,v in model.state_dict().items()}
    (a,lr),(b,lr_) = ended(),ended(Look())
    assert torch.equal(a, b) and lr == lr_ == .01

@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'after_batch', 'after_epoch', 'after_fit', 'cleanup_fit'])
def test_a_fit_within_its_own_fit_is_refused(model, dls, event):
    again = Callback()
    setattr(again, event, lambda learn: learn.fit(1))
    learn = TrainLearner(model, dls)
    with pytest.raises(RuntimeError, match='in the middle of a fit'): learn.fit(1, cbs=again)
    learn.fit(1)
    other = TrainLearner(model, dls)
    again.before_fit = lambda l: other.fit(1) if l is learn else None
    vars(again).pop(event) if event != 'before_fit' else None
    learn.fit(1, cbs=again) # that of another learner is not

@pytest.mark.parametrize('helper', ['preds', 'summary', 'lr_find', 'mc'])
def test_a_look_within_a_fit_leaves_its_random_numbers(helper):
    import miniai.augment # noqa: F401
    from torch.utils.data import DataLoader, TensorDataset
    from miniai.activations import set_seed
    from miniai.uncertainty import mc_predict
    gen = torch.Generator().manual_seed(0)
    x,y = torch.randn(40, 4, generator=gen),torch.randint(3, (40,), generator=gen)
    class Look(Callback):
        def after_epoch(self, learn):
            if helper == 'mc': assert mc_predict(learn, 4)[0].mutual_info.max() > 0, 'the passes differ'
            else: HELPERS[helper](learn)
            plt.close()
    def ended(*cbs):
        set_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3))
        data = DataLoaders(DataLoader(TensorDataset(x, y), 8, shuffle=True), DataLoader(TensorDataset(x, y), 8))
        Learner(model, data, F.cross_entropy, lr=.1, cbs=[TrainCB(), *cbs]).fit(3)
        return weights(model)
    assert torch.equal(ended(), ended(Look()))

def test_summary_of_averages(dls, capsys):
    import miniai.augment # noqa: F401
    from miniai.ema import EMACB
    learn = Learner(nn.Sequential(nn.Linear(4, 1)), dls, cbs=[TrainCB(), EMACB()])
    learn.fit(1)
    learn.summary()
    assert '|Linear|(16, 4)|(16, 1)|5|0.00|' in capsys.readouterr().out
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_metrics_that_changed_in_the_middle_of_an_epoch_are_named():
    state = MetricsCB(accuracy).state_dict()
    MetricsCB(mae=MeanAbsoluteError()).load_state_dict(state) # an epoch begins: nothing is lost
    with pytest.raises(ValueError, match=r"sums of the metrics \['accuracy', 'loss'\]"):
        MetricsCB(mae=MeanAbsoluteError()).load_state_dict(state | dict(begun=True))

def test_a_callback_that_supplies_steps_may_ask_for_help(model, dls):
    import miniai.augment # noqa: F401
    class Mine(TrainCB):
        def after_epoch(self, learn): seen.append(len(learn.capture_preds()[0]))
    seen = []
    Learner(model, dls, cbs=Mine()).fit(1)
    assert seen == [69, 69]
    class Alias(Callback):
        def ask(self, learn): seen.append(len(learn.capture_preds()[0]))
        after_loss = after_epoch = ask
    own = Callback()
    own.after_backward = lambda learn: seen.append(len(learn.capture_preds()[0]))
    for cb,n in ((Alias(), 16+2), (own, 11)):
        seen.clear()
        TrainLearner(model, dls, cbs=cb).fit(1)
        assert seen == [69]*n

def test_containers_of_any_kind_are_left_as_they_were(model, dls):
    import miniai.augment # noqa: F401
    class Keeps(Callback):
        def before_fit(self, learn): self.a,self.b,self.c = defaultdict(list),deque(),dict(x=[])
        def before_batch(self, learn): self.a['x'].append(1); self.b.append(1); self.c['x'].append(1)
    learn = TrainLearner(model, dls, cbs=(cb := Keeps()))
    learn.fit(1)
    learn.capture_preds(); learn.lr_find()
    assert len(cb.a['x']) == len(cb.b) == len(cb.c['x']) == 16

def test_metrics_with_a_part_in_the_batch_stay_out_of_it(model, dls, capsys):
    import miniai.augment # noqa: F401
    class Timed(MetricsCB):
        def before_batch(self, learn): self.t = 1
    class Look(Callback):
        order = 5
        def after_batch(self, learn):
            if learn.training and learn.iter == 3: learn.capture_preds()
    TrainLearner(model, dls, cbs=[metrics := Timed(), Look()]).fit(1, valid=False)
    metrics.loss.add_up()
    assert metrics.loss.weights == 83 and capsys.readouterr().out.count('epoch') == 1

def test_a_helper_leaves_workers_that_are_at_work(model):
    import miniai.augment # noqa: F401
    from torch.utils.data import DataLoader, TensorDataset
    x = torch.arange(40.)[:,None].repeat(1, 4)
    train = DataLoader(TensorDataset(x, x[:,:1]), 8, shuffle=True, num_workers=1, persistent_workers=True)
    seen = []
    class Look(Callback):
        def after_batch(self, learn):
            seen.extend(learn.batch[1].flatten().tolist())
            if learn.iter == 1: learn.show_image_batch(max_n=1); plt.close()
    def pictures(b): return b[0].view(-1, 1, 2, 2),b[1]
    from miniai.init import BatchTransformCB
    cbs = [TrainCB(), BatchTransformCB(pictures), Look()]
    Learner(nn.Sequential(nn.Flatten(), model), DataLoaders(train, []), lr=1e-6, cbs=cbs).fit(2, valid=False)
    assert sorted(seen) == sorted([float(i) for i in range(40)]*2)

def test_lr_find_puts_back_what_the_optimizer_has_besides_the_model(model, dls):
    scale = nn.Parameter(torch.ones(3))
    model.register_buffer('seen', torch.zeros(1), persistent=False)
    def opt_func(params, lr): return optim.SGD([*params, scale], lr=lr)
    def loss(p, y): model.seen.add_(1); return F.mse_loss(p*scale.sum(), y)
    Learner(model, dls, loss, cbs=TrainCB(), opt_func=opt_func).lr_find()
    assert scale.eq(1).all() and model.seen.item() == 0

def test_another_learner_may_train_in_an_evaluation(model, dls):
    other = TrainLearner(nn.Linear(4, 1), dls)
    class Both(Callback):
        def after_epoch(self, learn): other.fit(1)
    TrainLearner(model, dls, cbs=Both()).fit(1)

def test_progress_finds_metrics_that_began_in_their_own_way(model, dls):
    class Mine(MetricsCB):
        def before_fit(self, learn): pass
    TrainLearner(model, dls, cbs=[Mine(), prog := ProgressCB(plot=True)]).fit(2)
    assert len(prog.val_losses) == 2

def test_what_takes_part(model, dls):
    class Marked(Watch): takes_part = True
    class Not(Counts): takes_part = False
    class Own(Callback):
        def get_loss(self, learn): pass
    cbs = [TrainCB(), DeviceCB('cpu'), MetricsCB(), Watch(), Counts(), Marked(), Not(), Own(), SingleBatchCB()]
    aside = Learner(model, dls, cbs=cbs).fit_aside(cb := Watch(), valid=True)
    assert [type(o).__name__ for o in aside.cbs] == ['TrainCB', 'DeviceCB', 'Counts', 'Marked', 'Own', 'Watch']
    assert cb.n == 5 and not any(o in cbs for o in aside.cbs) and aside.cbs[-1] is cb

def test_a_helper_may_train_where_gradients_are_off(model, dls):
    with torch.no_grad(): TrainLearner(model, dls).lr_find()

# --- cleanups

@pytest.mark.parametrize('exc', [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize('level', ['batch', 'epoch', 'fit'])
def test_a_cleanup_that_fails_does_not_skip_the_others(model, dls, level, exc):
    rec = Recorder(order=20)
    learn = TrainLearner(model, dls, cbs=[RaiseCB(f'cleanup_{level}', exc('oops')), rec])
    with pytest.raises(exc, match='oops') as e: learn.fit(1)
    assert rec.seen[-1] == 'cleanup_fit'
    for o in ('batch', 'epoch', 'fit'): assert rec.seen.count(f'cleanup_{o}') == rec.seen.count(f'before_{o}')
    if exc is ValueError: assert 'RaiseCB' in e.value.__notes__[0]
    learn.cbs = [rec]
    learn.fit(1)

# --- Ctrl-C

def press(): signal.raise_signal(signal.SIGINT)

@pytest.mark.parametrize('event', ['before_fit', 'before_batch', 'after_predict', 'after_step', 'after_batch', 'cleanup_batch'])
def test_ctrl_c_waits_for_the_end_of_the_batch(model, dls, event):
    class Press(Callback):
        def before_fit(self, learn): self.pressed,self.done = False,0
        def after_batch(self, learn): self.done += 1
        def press(self, learn):
            if not self.pressed: self.pressed = True; press()
    cb,rec = Press(),Recorder(order=20)
    call = getattr(cb, event, lambda learn: None)
    setattr(cb, event, lambda learn: (call(learn), cb.press(learn)))
    learn = TrainLearner(model, dls, cbs=[cb, rec])
    with pytest.raises(KeyboardInterrupt): learn.fit(2)
    batches = 2 if event == 'cleanup_batch' else 1
    assert rec.seen.count('after_batch') == rec.seen.count('after_step') == rec.seen.count('cleanup_batch') == cb.done == batches
    assert rec.seen[-2:] == ['cleanup_epoch', 'cleanup_fit'] and signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_ctrl_c_at_the_end_of_a_fit_and_within_a_fit_aside(model, dls):
    class Last(Callback):
        def cleanup_fit(self, learn): press()
    with pytest.raises(KeyboardInterrupt): TrainLearner(model, dls).fit(1, cbs=Last())
    class Aside(Callback):
        def after_epoch(self, learn): learn.fit_aside(press_once, valid=True)
    class Once(Callback):
        def after_predict(self, learn): press()
    press_once = Once()
    with pytest.raises(KeyboardInterrupt): TrainLearner(model, dls).fit(1, cbs=Aside())
    TrainLearner(model, dls).fit(1)

def test_ctrl_c_twice_does_not_wait(model, dls):
    class Twice(Callback):
        def after_predict(self, learn): press(); press(); raise AssertionError('the second does not wait')
    with pytest.raises(KeyboardInterrupt): TrainLearner(model, dls).fit(1, cbs=Twice())

def test_a_handler_of_the_users_own_and_another_thread_are_left_alone(model, dls):
    came = []
    was = signal.signal(signal.SIGINT, lambda *a: came.append(1))
    try: TrainLearner(model, dls).fit(1, cbs=RaiseCB('after_batch', CancelFitException())); press()
    finally: signal.signal(signal.SIGINT, was)
    assert came == [1]
    thread = threading.Thread(target=lambda: TrainLearner(model, dls).fit(1))
    thread.start(); thread.join()

# --- batches, predictions and metrics of every kind

@dataclass
class Out:
    logits: torch.Tensor
    name: str = 'x'

class Wrap(nn.Module):
    def __init__(self, wrap): super().__init__(); self.lin,self.wrap = nn.Linear(4, 3),wrap
    def forward(self, x): return self.wrap(self.lin(x))

WRAPS = dict(tensor=(lambda t: t, lambda p: p), tuple=(lambda t: (t, t.sum()), lambda p: p[0]),
             dict=(lambda t: dict(logits=t, n=3), lambda p: p['logits']), fields=(Out, lambda p: p.logits),
             simple=(lambda t: SimpleNamespace(a=t), lambda p: p.a), nested=(lambda t: [dict(a=(t,))], lambda p: p[0]['a'][0]))

@pytest.fixture
def classes():
    gen = torch.Generator().manual_seed(0)
    def batches(*sizes): return [(torch.randn(n, 4, generator=gen), torch.randint(3, (n,), generator=gen)) for n in sizes]
    return DataLoaders(batches(8, 8, 3), batches(16, 5))

@pytest.mark.parametrize('wrap', WRAPS)
def test_predictions_may_be_anything(classes, wrap):
    import miniai.augment # noqa: F401
    make,tensor = WRAPS[wrap]
    metrics = MetricsCB(acc=lambda p,y: accuracy(tensor(p), y))
    learn = Learner(Wrap(make), classes, lambda p,y: F.cross_entropy(tensor(p), y), lr=.1, cbs=[TrainCB(), metrics, ProgressCB()])
    learn.fit(1)
    xs,ys = map(torch.cat, zip(*classes.valid))
    with torch.no_grad(): right = learn.model.lin(xs)
    preds,targs = learn.capture_preds()
    if wrap in ('fields', 'simple'): assert isinstance(preds, type(make(xs)))
    assert torch.allclose(tensor(preds), right, atol=1e-6) and torch.equal(targs, ys)
    assert float(metrics.metrics['acc'].compute()) == pytest.approx(accuracy(right, ys).item())

@pytest.mark.parametrize('make', [lambda x,y: (x, y), lambda x,y: [x, y], lambda x,y: dict(image=x, label=y),
                                  lambda x,y: SimpleNamespace(x=x, y=y)])
@pytest.mark.parametrize('cls', [TrainLearner, Learner])
def test_batches_may_be_anything(classes, make, cls):
    import miniai.augment # noqa: F401
    data = DataLoaders(*[[make(*b) for b in dl] for dl in (classes.train, classes.valid)])
    metrics = MetricsCB(accuracy)
    torch.manual_seed(0)
    learn = cls(nn.Linear(4, 3), data, F.cross_entropy, lr=.1, cbs=[DeviceCB('cpu'), metrics] + ([TrainCB()] if cls is Learner else []))
    learn.fit(1)
    xs,ys = map(torch.cat, zip(*classes.valid))
    preds,targs,inps = learn.capture_preds(inps=True)
    assert torch.equal(targs, ys) and torch.equal(inps, xs) and metrics.loss.weights == 21
    assert float(metrics.metrics['accuracy'].compute()) == pytest.approx(accuracy(preds, ys).item())

@pytest.mark.parametrize('cls', [TrainLearner, partial(Learner, cbs=TrainCB())])
def test_bare_tensors_are_whole_batches(cls):
    seen = []
    class Net(nn.Linear):
        def forward(self, x): seen.append(x.shape); return super().forward(x)
    x = torch.randn(6, 4)
    cls(Net(4, 1), DataLoaders([x], [x]), lambda p: p.square().mean()).fit(1)
    assert seen == [(6, 4)]*2

def test_what_cannot_be_done_is_said_by_name(model, classes):
    with pytest.raises(TypeError, match='this one is an int'): Learner(model, DataLoaders([3], []), cbs=TrainCB()).fit(1)
    with pytest.raises(ValueError, match='no target for the metrics'):
        Learner(nn.Linear(4, 3), DataLoaders([(torch.ones(2, 4),)], []), lambda p: p.mean(), cbs=[TrainCB(), MetricsCB(accuracy)]).fit(1)

def test_captured_targets_are_all_that_the_model_did_not_get():
    import miniai.augment # noqa: F401
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(4, 1)
        def forward(self, a, b): return self.lin(a+b)
    batches = [(torch.ones(n, 4), torch.ones(n, 4), torch.arange(n), [f'{n}.{i}' for i in range(n)]) for n in (3, 2)]
    learn = Learner(Two(), DataLoaders([], batches), lambda p,y,nm: p.mean(), cbs=TrainCB(n_inp=2))
    preds,(y,nm),inps = learn.capture_preds(inps=True)
    assert preds.shape == (5, 1) and y.tolist() == [0, 1, 2, 0, 1] and nm == ['3.0', '3.1', '3.2', '2.0', '2.1']
    assert [len(o) for o in inps] == [5, 5]

def test_predictions_of_different_structure_cannot_be_joined(classes):
    import miniai.augment # noqa: F401
    learn = Learner(Wrap(lambda t: (t,)*(len(t)//5)), classes, lambda p,y: p[0].mean(), cbs=TrainCB())
    with pytest.raises(ValueError, match='predictions of all batches'): learn.capture_preds()

METRICS = dict(bools=lambda p,y: p.argmax(1) == y, tensor=lambda p,y: METRICS['bools'](p, y).float().mean(),
               float=lambda p,y: METRICS['tensor'](p, y).item(), array=lambda p,y: METRICS['bools'](p, y).numpy(),
               numpy=lambda p,y: np.mean(METRICS['array'](p, y)))

@pytest.mark.parametrize('kind', METRICS)
@pytest.mark.parametrize('as_dict', [False, True])
def test_metrics_may_return_any_numbers(classes, kind, as_dict, capsys):
    f = METRICS[kind]
    metrics = MetricsCB(it=(lambda p,y: dict(share=f(p, y), two=2)) if as_dict else f)
    learn = Learner(nn.Linear(4, 3), classes, F.cross_entropy, cbs=[TrainCB(), metrics])
    learn.fit(1)
    xs,ys = map(torch.cat, zip(*classes.valid))
    with torch.no_grad(): right = accuracy(learn.model(xs), ys).item()
    got = metrics.metrics['it'].compute()
    assert float(got['share'] if as_dict else got) == pytest.approx(right)
    assert (f"'share': '{right:.3f}', 'two': '2.000'" if as_dict else f"'it': '{right:.3f}'") in capsys.readouterr().out

def test_names_within_a_metric_do_not_take_those_of_others(classes, capsys):
    metrics = MetricsCB(d=lambda p,y: dict(loss=1., epoch=2, acc=7.))
    Learner(nn.Linear(4, 3), classes, F.cross_entropy, cbs=[TrainCB(), metrics]).fit(1, train=False)
    assert "'d.loss': '1.000', 'd.epoch': '2.000', 'acc': '7.000', 'loss': '" in capsys.readouterr().out

def test_a_metric_that_gives_no_number_is_named(classes):
    def share(p, y): return None
    with pytest.raises(TypeError, match='metric share should return numbers: .* this is None'):
        Learner(nn.Linear(4, 3), classes, F.cross_entropy, cbs=[TrainCB(), MetricsCB(share)]).fit(1)

def test_metrics_of_one_name_and_others_that_would_be_lost():
    twice = ([accuracy]*2, {}),([MeanAbsoluteError()]*2, {}),([accuracy], dict(accuracy=accuracy)),([lambda p,y: 1, lambda p,y: 2], {})
    for ms,kw in twice:
        with pytest.raises(ValueError, match='two metrics of the name'): MetricsCB(*ms, **kw)
    for k in ('loss', 'epoch', 'train'):
        with pytest.raises(ValueError, match='another name'): MetricsCB(**{k: accuracy})
    for bad in (3, None, 'acc'):
        with pytest.raises(TypeError, match='a metric is a function'): MetricsCB(acc=bad)

@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'after_epoch', 'cleanup_epoch'])
def test_a_subclass_may_replace_any_event_without_asking_its_parent(classes, event):
    class Mine(MetricsCB): pass
    setattr(Mine, event, lambda self, learn: None)
    metrics = Mine(accuracy)
    learn = Learner(nn.Linear(4, 3), classes, F.cross_entropy, lr=0., cbs=[TrainCB(), metrics])
    learn.fit(2)
    metrics.loss.add_up()
    assert metrics.loss.weights == 21

def test_a_table_of_numbers_in_a_terminal(classes, capsys):
    class Epochs(Callback):
        def before_fit(self, learn): learn.metrics = self
        def after_epoch(self, learn): self._log(dict(epoch=learn.epoch, loss=learn.loss.item(), best=None, left=learn.n_epochs-learn.epoch))
    TrainLearner(nn.Linear(4, 3), classes, F.cross_entropy, cbs=[Epochs(), ProgressCB()]).fit(2, valid=False)
    out = capsys.readouterr().out
    assert [l.split()[::2] for l in out.splitlines() if l[:1] in ('0', '1')] == [['0', 'None'], ['1', 'None']]

class Group(Callback):
    "As GradAccumCB: asks the loader, after the bar has been put around it"
    order = 9
    def before_epoch(self, learn): self.seen = len(learn.dl),learn.dl.bs,getattr(learn.dl, 'none', None)

def test_what_wraps_the_loader_keeps_what_the_loader_has(model):
    x = torch.randn(20, 4)
    dl = TensorLoader(x, x.sum(1, keepdim=True), bs=8)
    TrainLearner(model, DataLoaders(dl, dl), cbs=[ProgressCB(), group := Group()]).fit(1)
    assert group.seen == (3, 8, None)
    wrapped = WrappedDL(dl)
    assert len(copy.copy(wrapped)) == 3 and len(list(wrapped)) == 3 and wrapped.tensors is dl.tensors

def test_the_state_of_metrics_and_curves_goes_on(classes):
    "What CheckpointCB asks for in the middle of an epoch"
    def make(): return MetricsCB(accuracy, mae=MeanAbsoluteError(), two=lambda p,y: dict(a=1., b=p.mean())),ProgressCB(plot=True)
    def fit(cbs, *more):
        torch.manual_seed(0)
        Learner(nn.Linear(4, 3), classes, F.cross_entropy, lr=0., cbs=[TrainCB(), *cbs, *more, Callback()]).fit(1, valid=False)
    class Keep(Callback):
        order = 100
        def after_batch(self, learn):
            if learn.iter == 1: self.states = [copy.deepcopy(cb.state_dict()) for cb in learn.cbs[1:3]]
    class Restore(Callback):
        order = 100
        def before_epoch(self, learn):
            for cb,s in zip(learn.cbs[1:3], keep.states): cb.load_state_dict(s)
            learn.dl = list(learn.dl)[2:]
    class Sum(MeanAbsoluteError):
        def update(self, preds, targs): super().update(preds.argmax(1).float(), targs.float())
    whole,resumed,keep = make(),make(),Keep()
    for m,_ in (whole, resumed): m.metrics['mae'] = m.all_metrics['mae'] = Sum()
    fit(whole, keep); fit(resumed, Restore())
    assert resumed[1].losses == whole[1].losses
    for a,b in zip(whole[0].all_metrics.values(), resumed[0].all_metrics.values()): assert a.compute() == b.compute()

def test_a_loss_that_is_no_number_is_said_once_an_epoch(model, dls):
    bad = DataLoaders([(x*math.nan, y) for x,y in dls.train], [])
    with pytest.warns(UserWarning, match='the loss is nan after epoch 0') as w: TrainLearner(model, bad).fit(1, valid=False)
    assert len(w) == 1

def test_what_a_careful_person_gets_wrong_is_said_where_it_is_given(model, dls):
    with pytest.raises(TypeError, match=r'write CrossEntropyLoss\(...\)'): Learner(model, dls, nn.CrossEntropyLoss)
    with pytest.raises(TypeError, match='model is the class Linear'): Learner(nn.Linear, dls)
    with pytest.raises(TypeError, match='loss_func is a function'): Learner(model, dls, 'mse')
    for bad in (1.5, None, math.nan, -1, '3'):
        with pytest.raises(TypeError, match='n_epochs'): TrainLearner(model, dls).fit(bad)
    for bad in (0, 'bf16', 1.5):
        with pytest.raises((TypeError, ValueError), match='n_inp'): TrainCB(bad)
    with pytest.raises(ValueError, match='mom is the share'): MomentumLearner(model, dls, F.mse_loss, mom=5)
    TrainLearner(model, dls).fit(np.int64(1))
    for bad in ((1, .01), (1, True, .1), (1, None)): # as fastai has it
        with pytest.raises(TypeError, match='by name: lr=0.01'): TrainLearner(model, dls).fit(*bad)
    with pytest.raises(TypeError, match='lr is a number'): TrainLearner(model, dls).fit(1, lr='x')

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
