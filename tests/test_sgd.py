"Schedulers step when they should, and what they did is written down"
from functools import partial

import pytest, torch
from helpers import RaiseCB, Recorder
from torch import optim
from torch.optim import lr_scheduler

from miniai.learner import CancelStepException, TrainLearner
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
    TrainLearner(model, dls, cbs=[sched := BatchSchedCB(one_cycle), RaiseCB('after_backward', CancelStepException(), n=4)]).fit(1)
    assert sched.schedo.last_epoch == 10

@pytest.mark.parametrize('cls', [BatchSchedCB, EpochSchedCB])
def test_lr_find_leaves_it_out_and_puts_it_back(model, dls, cls):
    learn = TrainLearner(model, dls, cbs=[sched := cls(one_cycle), rec := Recorder()])
    learn.lr_find()
    assert not hasattr(sched, 'schedo') and rec.seen and learn.cbs == [sched, rec]

def test_state_goes_on_where_it_was(model, dls):
    TrainLearner(model, dls, cbs=(first := BatchSchedCB(one_cycle))).fit(1)
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
