"Schedulers step when they should, and what they did is written down"
import io, warnings
from functools import partial

import numpy as np, pytest, torch
from helpers import HandSGD, RaiseCB, weights
from torch import nn, optim
from torch.optim import lr_scheduler

from miniai.accel import CheckpointCB, GradAccumCB
from miniai.learner import Callback, CancelFitException, CancelStepException, TrainCB, TrainLearner
from miniai.sgd import BaseSchedCB, BatchSchedCB, EpochSchedCB, HasLearnCB, RecorderCB

def recorder(): return RecorderCB(lr=lambda cb: cb.pg['lr'])
one_cycle = partial(lr_scheduler.OneCycleLR, max_lr=.1, total_steps=22)

def by_hand(model, sched, n_epochs, steps, each_epoch):
    "The learning rate of each step in a plain loop"
    opt = optim.SGD(model.parameters(), lr=.1)
    schedo,lrs = sched(opt),[]
    for _ in range(n_epochs):
        for _ in range(steps):
            opt.step()
            if not each_epoch: schedo.step()
            lrs.append(opt.param_groups[0]['lr']) # as after_batch sees it, behind the scheduler
        if each_epoch: schedo.step()
    return lrs

@pytest.mark.filterwarnings('ignore:.*ended (before|after) the training')
@pytest.mark.parametrize('sched', [one_cycle, partial(lr_scheduler.CosineAnnealingLR, T_max=22), partial(lr_scheduler.StepLR, step_size=3),
                                   partial(lr_scheduler.LambdaLR, lr_lambda=lambda i: 1/(1+i))], ids=lambda f: f.func.__name__)
@pytest.mark.parametrize('cls', [BatchSchedCB, EpochSchedCB])
def test_rates_are_those_of_a_plain_loop(model, dls, cls, sched):
    cbs = [cls(sched), rec := recorder()]
    for _ in range(2): # the same callbacks in a second fit begin anew
        TrainLearner(model, dls, lr=.1, cbs=cbs).fit(2)
        assert rec.recs['lr'] == pytest.approx(by_hand(model, sched, 2, 11, cls is EpochSchedCB))

def test_a_schedule_a_recorder_and_adam_with_the_learner(model, dls):
    rec,sched = recorder(),BatchSchedCB(one_cycle)
    TrainLearner(model, dls, opt_func=optim.Adam, cbs=[sched, rec, HasLearnCB()]).fit(2)
    assert len(rec.recs['lr']) == 22 and isinstance(sched, BaseSchedCB) and sched.schedo.last_epoch == 22
    epoch = EpochSchedCB(partial(lr_scheduler.StepLR, step_size=1))
    TrainLearner(model, dls, cbs=epoch).fit(2)
    assert epoch.schedo.last_epoch == 2

@pytest.mark.parametrize('cls', [BatchSchedCB, EpochSchedCB])
def test_validation_alone_moves_nothing(model, dls, cls):
    TrainLearner(model, dls, lr=.1, cbs=[sched := cls(one_cycle), rec := recorder()]).fit(3, train=False)
    assert sched.schedo.last_epoch == 0 and rec.recs == dict(lr=[])

def test_a_batch_without_a_step_is_not_counted(model, dls):
    sched = BatchSchedCB(partial(one_cycle, total_steps=11)) # a step that is left out now and then is no reason to warn
    TrainLearner(model, dls, cbs=[sched, RaiseCB('after_backward', CancelStepException(), n=4)]).fit(1)
    assert sched.schedo.last_epoch == 10

@pytest.mark.parametrize('cls', [BatchSchedCB, EpochSchedCB])
def test_lr_find_leaves_it_out(model, dls, cls):
    learn = TrainLearner(model, dls, cbs=[sched := cls(one_cycle), rec := recorder()])
    learn.lr_find()
    assert not hasattr(sched, 'schedo') and not rec.recs and learn.cbs == [sched, rec]

def test_state_goes_on_where_it_was(model, dls):
    with pytest.warns(UserWarning, match='total_steps=11'): TrainLearner(model, dls, cbs=(first := BatchSchedCB(one_cycle))).fit(1)
    second = BatchSchedCB(one_cycle)
    second.schedo = second.sched(optim.SGD(model.parameters(), lr=.1))
    second.load_state_dict(first.state_dict())
    assert second.schedo.last_epoch == 11 and second.schedo.state_dict() == first.schedo.state_dict()

@pytest.mark.parametrize('cb', [BatchSchedCB(one_cycle), EpochSchedCB(one_cycle), recorder()], ids=lambda cb: type(cb).__name__)
def test_without_an_optimizer(model, dls, cb):
    with pytest.raises(ValueError, match=f'{type(cb).__name__} has no optimizer'): TrainLearner(model, dls, cbs=cb, opt_func=None).fit(1)

def test_the_learner_is_let_go_of_after_an_error(model, dls):
    with pytest.raises(OSError): TrainLearner(model, dls, cbs=[cb := HasLearnCB(), RaiseCB('after_loss', OSError())]).fit(1)
    assert cb.learn is None

def test_any_setting_can_be_recorded_on_the_device_too(model, dls):
    rec = RecorderCB(mom=lambda cb: cb.pg['momentum'], norm=lambda cb: torch.stack([p.norm() for p in cb.pg['params']]).norm())
    TrainLearner(model, dls, cbs=rec, opt_func=partial(optim.SGD, momentum=.7)).fit(1)
    assert rec.recs['mom'] == [.7]*11 and len(rec.recs['norm']) == 11 and isinstance(rec.recs['norm'][0], torch.Tensor)
    rec.plot()

# schedules that do not fit the training

def cosine(n): return partial(lr_scheduler.CosineAnnealingLR, T_max=n)
def cycle(n): return partial(lr_scheduler.OneCycleLR, max_lr=.1, total_steps=n)
def warm(o): return lr_scheduler.LinearLR(o, total_iters=3)
def warm_cosine(n): return lambda o: lr_scheduler.SequentialLR(o, [warm(o), cosine(n-3)(o)], [3])
def chained(n): return lambda o: lr_scheduler.ChainedScheduler([warm(o), cosine(n)(o)])
def to_zero(n): return partial(lr_scheduler.LinearLR, start_factor=1., end_factor=0., total_iters=n)
def poly(n): return partial(lr_scheduler.PolynomialLR, total_iters=n)

def warned(model, dls, *cbs, n=2, **kw):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        TrainLearner(model, dls, lr=.1, cbs=cbs, **kw).fit(n)
    return [str(w.message) for w in found if 'the training' in str(w.message)]

@pytest.mark.parametrize('made', [cosine, warm_cosine, chained, to_zero, poly], ids=lambda f: f.__name__)
def test_a_schedule_that_ends_early_or_late_says_so_with_the_right_number(model, dls, made):
    "The cosine climbs back to its top and nobody sees it in the loss"
    for n,when in ((20, 'before'), (30, 'after')):
        msg, = warned(model, dls, BatchSchedCB(made(n)))
        assert f'ended {when} the training: it was made for {n} steps, but the training had 22 steps' in msg and msg.endswith('=22')
    assert warned(model, dls, BatchSchedCB(made(22))) == []

@pytest.mark.parametrize('sched', [partial(lr_scheduler.StepLR, step_size=3), partial(lr_scheduler.LambdaLR, lr_lambda=lambda i: 1/(1+i)),
                                   partial(lr_scheduler.MultiStepLR, milestones=[5]), partial(lr_scheduler.ExponentialLR, gamma=.9),
                                   partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=5),
                                   partial(lr_scheduler.LinearLR, total_iters=5), partial(lr_scheduler.ConstantLR, total_iters=5)],
                         ids=lambda f: f.func.__name__)
@pytest.mark.parametrize('cls', [BatchSchedCB, EpochSchedCB])
def test_what_has_no_end_is_left_alone_and_so_is_a_warm_up(model, dls, cls, sched):
    assert warned(model, dls, cls(sched), n=6) == []

def test_a_warm_up_that_never_ends_is_told(model, dls):
    msg, = warned(model, dls, BatchSchedCB(partial(lr_scheduler.LinearLR, total_iters=100)))
    assert 'after the training' in msg and 'total_iters=22' in msg

def test_epochs_are_counted_as_epochs(model, dls):
    assert warned(model, dls, EpochSchedCB(cosine(2))) == []
    msg, = warned(model, dls, EpochSchedCB(cosine(22)))
    assert 'made for 22 epochs, but the training had 2 epochs' in msg and 'T_max=2' in msg

@pytest.mark.parametrize('n,steps', [(2, 12), (4, 6)])
def test_with_accumulation_steps_are_counted_not_batches(model, dls, n, steps):
    msg, = warned(model, dls, TrainCB(), GradAccumCB(n), BatchSchedCB(cycle(22)))
    assert f'had {steps} steps (steps, not batches: the optimizer steps once in {n} of them)' in msg and f'total_steps={steps}' in msg
    assert warned(model, dls, TrainCB(), GradAccumCB(n), BatchSchedCB(cycle(steps))) == []

@pytest.mark.parametrize('cut', [RaiseCB('after_batch', CancelFitException(), 5), RaiseCB('after_batch', KeyboardInterrupt(), 5)])
def test_a_fit_that_is_cut_short_says_nothing_of_its_schedule(model, dls, cut):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        try: TrainLearner(model, dls, cbs=[BatchSchedCB(cosine(22)), cut]).fit(2)
        except KeyboardInterrupt: pass
        TrainLearner(model, dls, cbs=BatchSchedCB(cosine(22))).fit(2, train=False)

@pytest.mark.parametrize('cbs,epochs,n,right', [((), 3, 22, 33), ((TrainCB(), GradAccumCB(2)), 4, 20, 24)], ids=['plain', 'accumulation'])
def test_one_cycle_past_its_end_names_the_number_it_should_have(model, dls, cbs, epochs, n, right):
    with pytest.raises(ValueError, match=f'was made for {n} steps.* for {epochs} epochs.*total_steps={right}'):
        TrainLearner(model, dls, cbs=[*cbs, BatchSchedCB(cycle(n))]).fit(epochs)

def test_one_cycle_past_its_end_of_epochs_and_of_a_stream(model, dls):
    with pytest.raises(ValueError, match='total_steps=3'): TrainLearner(model, dls, cbs=EpochSchedCB(cycle(2))).fit(3)
    class Stream:
        def __iter__(self): return iter(batches)
    batches,dls.train = dls.train,Stream()
    with pytest.raises(ValueError, match='total_steps=epochs times steps'): TrainLearner(model, dls, cbs=BatchSchedCB(cycle(12))).fit(2)

@pytest.mark.parametrize('made', [cosine, cycle, warm_cosine, poly], ids=lambda f: f.__name__)
def test_a_resumed_fit_has_the_schedule_that_it_began_with(model, dls, tmp_path, made):
    "Twice the epochs, and twice the length: the checkpoint's would have come back, and the rate climbed to its top"
    TrainLearner(model, dls, cbs=[BatchSchedCB(made(22)), CheckpointCB(tmp_path, resume=True)]).fit(2)
    with pytest.raises(ValueError, match='the checkpoint|checkpoint.*epochs'):
        TrainLearner(model, dls, cbs=[BatchSchedCB(made(44)), CheckpointCB(tmp_path, resume=True)]).fit(4)

# what makes no scheduler

@pytest.mark.parametrize('bad', [3, 'cosine', optim.SGD, partial(optim.Adam, lr=1.), None], ids=str)
def test_no_function_that_makes_a_scheduler(bad):
    with pytest.raises(TypeError, match='has to be a function that makes a scheduler'): BatchSchedCB(bad)

def test_functions_that_make_something_else(model, dls):
    old = lr_scheduler.StepLR(optim.SGD(model.parameters(), .1), 2)
    for sched,what in ((lambda o: None, 'has no step'), (lambda o: 3, 'has no step'), (lambda o: lr_scheduler.StepLR, 'has no step'),
                       (lr_scheduler.ReduceLROnPlateau, 'without a metric, which ReduceLROnPlateau asks for'),
                       (lambda o: old, 'scheduler of another optimizer')):
        for cls in (BatchSchedCB, EpochSchedCB):
            with pytest.raises((TypeError, ValueError), match=what): TrainLearner(model, dls, cbs=cls(sched)).fit(1)

# optimizers and schedulers by hand, subclasses, and what goes on after a resume

class Halve:
    def __init__(self, opt): self.opt = opt
    def step(self): self.opt.lr /= 2

def test_optimizers_and_schedulers_by_hand(model, dls):
    was = weights(model)
    rec = RecorderCB(lr=lambda cb: cb.opt.lr, n=lambda cb: 1)
    TrainLearner(model, dls, lr=.1, cbs=[EpochSchedCB(Halve), rec], opt_func=HandSGD).fit(2)
    assert not torch.equal(was, weights(model)) and rec.recs['lr'][::11] == [.1, .05]
    with pytest.raises(ValueError, match='HandSGD has none'): TrainLearner(model, dls, cbs=recorder(), opt_func=HandSGD).fit(1)
    with pytest.raises(TypeError, match='state_dict of the scheduler, and Halve has none'):
        (cb := EpochSchedCB(Halve)).__dict__.update(schedo=Halve(None))
        cb.state_dict()

@pytest.mark.parametrize('event', 'before_fit before_epoch after_fit cleanup_fit'.split())
def test_a_subclass_may_replace_any_event(model, dls, event):
    def trained(cls, rec_cls):
        torch.manual_seed(0)
        net,rec = nn.Linear(4, 1),rec_cls(lr=lambda cb: cb.pg['lr'])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            TrainLearner(net, dls, cbs=[sched := cls(cycle(22)), rec]).fit(2)
            for cb in (sched, rec): assert not isinstance(cb, Seen) or cb.seen
            TrainLearner(net, dls, cbs=[sched, rec]).fit(2)
        return rec.recs['lr'][-22:]
    class Seen(Callback):
        seen = False
    def note(self, learn): self.seen = True
    Sched,Rec = (type(f'My{cls.__name__}', (Seen, cls), {event: note}) for cls in (BatchSchedCB, RecorderCB))
    assert trained(Sched, Rec) == trained(BatchSchedCB, RecorderCB)

@pytest.mark.parametrize('bad', [3, 'lr', None, torch.ones(1)], ids=str)
def test_what_is_recorded_is_a_function(bad):
    with pytest.raises(TypeError, match='lr has to be a function'): RecorderCB(lr=bad)

def test_the_group_is_the_one_that_the_optimizer_has_now(model, dls):
    "load_state_dict puts other dicts in the place of the groups"
    class Load(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 1 and learn.training: learn.opt.load_state_dict(learn.opt.state_dict())
        def after_batch(self, learn): learn.opt.param_groups[0]['lr'] *= .9
    TrainLearner(model, dls, lr=.1, cbs=[rec := recorder(), Load()]).fit(2, valid=False)
    assert rec.recs['lr'] == pytest.approx([.1*.9**i for i in range(22)])

def rows(): return RecorderCB(lr=lambda cb: cb.pg['lr'], w=lambda cb: cb.pg['params'][0].detach().clone(), np=lambda cb: np.float32(2.5),
                              arr=lambda cb: np.ones(2), several=lambda cb: dict(a=[1, None], b=('x', torch.ones(1))))

@pytest.mark.parametrize('at', [3, 11, 14])
def test_recorded_series_go_on_after_an_interruption(model, dls, tmp_path, at):
    def fit(*cbs):
        torch.manual_seed(0)
        learn = TrainLearner(nn.Linear(4, 1), dls, lr=.05, cbs=[BatchSchedCB(cycle(22)), rec := rows(), *cbs])
        learn.fit(2)
        return rec
    whole = fit()
    with pytest.raises(KeyboardInterrupt): fit(CheckpointCB(tmp_path, every=1), RaiseCB('after_batch', KeyboardInterrupt(), at))
    again = fit(CheckpointCB(tmp_path, every=1, resume=True))
    assert {k: len(v) for k,v in again.recs.items()} == dict.fromkeys(again.recs, 22)
    assert again.recs['lr'] == whole.recs['lr'] and all(map(torch.equal, again.recs['w'], whole.recs['w']))

@pytest.mark.parametrize('at', [2, 6, 12, 18])
def test_steps_left_out_are_remembered_over_an_interruption(model, dls, tmp_path, at):
    "In 16 bits the first steps are left out: that is no reason to warn, nor after a resume"
    class LeaveOut(Callback):
        order = 5
        def after_backward(self, learn):
            if learn.epoch == 0 and learn.iter < 3: raise CancelStepException
    def fit(*cbs): TrainLearner(model, dls, lr=.01, cbs=[BatchSchedCB(cycle(22)), LeaveOut(), *cbs]).fit(2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(KeyboardInterrupt): fit(CheckpointCB(tmp_path, every=1), RaiseCB('after_batch', KeyboardInterrupt(), at))
        fit(CheckpointCB(tmp_path, every=1, resume=True))

def test_a_recorders_state_is_plain(model, dls):
    rec = rows()
    rec.d['odd'] = lambda cb: cb
    TrainLearner(model, dls, cbs=rec).fit(1)
    with pytest.warns(UserWarning, match='odd holds a RecorderCB'): state = rec.state_dict()
    torch.save(state, buf := io.BytesIO())
    buf.seek(0)
    (new := rows()).load_state_dict(torch.load(buf, weights_only=True))
    assert set(new.recs) == set(rec.recs)-{'odd'} and new.recs['np'] == [2.5]*11 and new.recs['several'][0]['a'] == [1, None]
    assert all(o.device.type == 'cpu' for o in new.recs['w'])
