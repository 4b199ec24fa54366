"Mixed precision, clipping, accumulation, and several processes"
import copy, os, subprocess, sys
from functools import partial
from types import SimpleNamespace

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn, optim

import miniai.accel, miniai.augment, miniai.checkpoint, miniai.ema
from helpers import HandSGD, lines_run
from miniai.accel import AccelerateCB, GradAccumCB, GradClipCB, MixedPrecision
from miniai.datasets import DataLoaders
from miniai.ema import EMACB
from miniai.learner import (Callback, CancelEpochException, DeviceCB, Learner, MetricsCB, MomentumLearner, ProgressCB, TrainCB,
                            TrainLearner)

pytestmark = pytest.mark.filterwarnings('ignore:mixed precision is meant')

def test_averages_and_checkpoints_are_still_found_here():
    assert miniai.accel.EMACB is miniai.ema.EMACB and miniai.accel.CheckpointCB is miniai.checkpoint.CheckpointCB
    assert {'EMACB', 'CheckpointCB'} <= set(miniai.accel.__all__)

ENGINES = [partial(MixedPrecision, dtype=torch.float16), partial(MixedPrecision, dtype=torch.bfloat16),
           partial(AccelerateCB, mixed_precision='no'), partial(AccelerateCB, mixed_precision='bf16')]
engines = pytest.mark.parametrize('engine', ENGINES, ids=['mixed-fp16', 'mixed-bf16', 'accelerate-no', 'accelerate-bf16'])
def own(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

SCRIPT = """
import sys, torch, torch.nn.functional as F
from pathlib import Path
from accelerate import notebook_launcher
from torch import nn
from miniai.activations import set_seed
from miniai.accel import AccelerateCB, GradAccumCB
from miniai.augment import CapturePreds
from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders, TensorLoader
from miniai.learner import Callback, Learner, MetricsCB, ProgressCB
from miniai.training import accuracy

class Losses(Callback):
    order = MetricsCB.order+5
    def after_epoch(self, learn): lines.append(repr(learn.metrics.all_metrics['loss'].compute().item()))

class Seen(Callback):
    def before_batch(self, learn):
        if learn.training: seen.extend(learn.batch[0][:,0].tolist())

class Ask(Callback):
    "Looks at predictions in the middle of training"
    def ask(self, learn):
        preds,targs = learn.capture_preds()
        assert 0 < len(preds) == len(targs) <= 100
    after_epoch = ask
    def before_batch(self, learn):
        if learn.training and learn.iter == 2: self.ask(learn)

lines,seen,folder = [],[],Path(sys.argv[2])
def train():
    set_seed(1)
    x,model = torch.randn(100, 20),nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))
    y = (x[:,0] > 0).long() + (x[:,1] > 0)
    dls = DataLoaders(TensorLoader(x, y, bs=17, shuffle='shuffle' in sys.argv), TensorLoader(x, y, bs=35))
    engine,checkpoints = AccelerateCB(mixed_precision='no'),CheckpointCB(folder/'checkpoints')
    cbs = [engine, MetricsCB(accuracy=accuracy), ProgressCB(), Losses(), Seen(), checkpoints]
    if 'ask' in sys.argv: cbs.append(Ask())
    if 'accumulate' in sys.argv: cbs.append(GradAccumCB(2))
    learn = Learner(model, dls, F.cross_entropy, .1, cbs)
    learn.fit(3)
    assert learn.model is model and learn.dls is dls and len(learn.cbs) == len(cbs)
    lines.append(repr(torch.cat([p.flatten() for p in model.parameters()]).tolist()))
    rank = engine.acc.process_index
    (folder/f'{rank}.txt').write_text('\\n'.join(lines))
    torch.save((x, torch.tensor(seen)), folder/f'{rank}.pt')

notebook_launcher(train, num_processes=int(sys.argv[1]))
"""

def launch(n, folder, *args):
    folder.mkdir()
    (script := folder/'fit.py').write_text(SCRIPT)
    res = subprocess.run([sys.executable, str(script), str(n), str(folder), *args], capture_output=True, text=True,
                         env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'})
    assert res.returncode == 0, res.stderr[-3000:]
    return res.stdout

def numbers(folder, rank): return [torch.tensor(eval(line)) for line in (folder/f'{rank}.txt').read_text().splitlines()]

@pytest.mark.parametrize('args', [(), ('ask', 'accumulate')], ids=['plain', 'helpers within, accumulated'])
def test_two_processes_learn_what_one_does(tmp_path, args):
    outs = {n: launch(n, tmp_path/str(n), *args) for n in (1, 2)}
    alone,*both = numbers(tmp_path/'1', 0),numbers(tmp_path/'2', 0),numbers(tmp_path/'2', 1)
    for together in both:
        for a,b in zip(alone, together, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for out in outs.values(): assert out.count('accuracy') == 1, 'one table'
    assert len(list((tmp_path/'2'/'checkpoints').glob('step-*'))) == 3

def test_two_processes_share_every_batch_of_a_shuffled_set(tmp_path):
    launch(2, tmp_path/'2', 'shuffle')
    (x,a),(_,b) = [torch.load(tmp_path/'2'/f'{rank}.pt') for rank in (0, 1)]
    assert abs(len(a)-len(b)) <= 3*6 and len(a)+len(b) == 3*len(x)
    for epoch in range(3):
        seen = torch.cat([o[epoch*len(o)//3:(epoch+1)*len(o)//3] for o in (a, b)])
        assert torch.equal(seen.sort()[0], x[:,0].sort()[0]), 'each item once an epoch'
    assert not torch.equal(a[:9], a[len(a)//3:][:9])

class Oops(Callback):
    def __init__(self, training): self.training = training
    def after_predict(self, learn):
        if learn.training == self.training: raise RuntimeError('oops')

@pytest.mark.parametrize('training', [True, False])
def test_an_error_leaves_autocast_and_the_learner_as_they_were(model, dls, training):
    cbs = [MixedPrecision(), Oops(training)]
    with pytest.raises(RuntimeError, match='oops'): Learner(model, dls, cbs=cbs).fit(1)
    assert not torch.is_autocast_enabled('cpu')
    learn = Learner(model, dls, cbs=[AccelerateCB(mixed_precision='no'), Oops(training)])
    with pytest.raises(RuntimeError, match='oops'): learn.fit(1)
    assert learn.model is model and learn.dls is dls and len(learn.cbs) == 2

def test_accelerate_and_a_device_elsewhere(model, dls):
    class Elsewhere(DeviceCB):
        def before_fit(self, learn): pass
    learn = Learner(model, dls, cbs=[AccelerateCB(mixed_precision='no'), Elsewhere('meta')])
    with pytest.raises(ValueError, match='leave DeviceCB out'): learn.fit(1)
    assert learn.model is model and learn.dls is dls

def test_accelerate_with_one_precision_after_another(model, dls):
    "accelerate itself refuses that; and the first callback must not take over the precision of the second"
    class Look(Callback):
        order = AccelerateCB.order+1
        def before_batch(self, learn): self.precision = cb.acc.mixed_precision
    first,second = AccelerateCB(mixed_precision='no'),AccelerateCB(mixed_precision='bf16')
    for cb in (first, second, first, second, second):
        learn = Learner(model, dls, cbs=[cb, look := Look()])
        learn.fit(1)
        assert look.precision == cb.mixed_precision and learn.model is model

@pytest.mark.parametrize('cb', [TrainCB, partial(MixedPrecision, dtype=torch.float16), partial(AccelerateCB, mixed_precision='no')])
def test_clipping_and_accumulation_go_with_every_engine(model, dls, cb):
    class Steps(Callback):
        n = 0
        def after_step(self, learn): self.n += learn.stepped
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    cbs = [cb(), GradClipCB(1e-3), GradAccumCB(3), steps := Steps()]
    Learner(model, DataLoaders(dls.train[:3], []), lr=1., cbs=cbs).fit(20, valid=False) # float16 begins with a scale that overflows
    end = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert 1 <= steps.n <= 20 and (steps.n == 20 or cb is not TrainCB)
    torch.testing.assert_close((end.cpu()-start).norm(), torch.tensor(1e-3*steps.n), atol=1e-6, rtol=1e-2)

@pytest.mark.parametrize('n', [1, 2, 3, 4, 7, 50])
def test_accumulation_is_one_large_batch(model, dls, n):
    "Eleven batches, the last smaller: groups of n, and what is left"
    other,big = copy.deepcopy(model),[]
    for i in range(0, len(dls.train), n): big.append(tuple(torch.cat(o) for o in zip(*dls.train[i:i+n])))
    Learner(model, dls, cbs=[TrainCB(), GradAccumCB(n)], lr=.01).fit(2, valid=False)
    Learner(other, DataLoaders(big, []), cbs=TrainCB(), lr=.01).fit(2, valid=False)
    for a,b in zip(model.parameters(), other.parameters()): torch.testing.assert_close(a, b)

def test_the_loss_that_is_shown_is_not_scaled(model, dls):
    losses = []
    class Look(Callback):
        def after_batch(self, learn): losses.append(learn.loss.item())
    Learner(model, dls, lr=0., cbs=[TrainCB(), GradAccumCB(4), Look()]).fit(1)
    for (x,y),loss in zip([*dls.train, *dls.valid], losses): assert loss == pytest.approx(F.mse_loss(model(x), y).item(), rel=1e-5)

@pytest.mark.parametrize('opt', [optim.SGD, partial(optim.Adam, fused=True), partial(optim.Adam, foreach=True)])
@pytest.mark.parametrize('every', [1, 2])
def test_a_step_that_is_left_out_is_seen(model, dls, opt, every):
    "Fused optimizers step always, and look at the infinities themselves"
    class Overflow(Callback):
        def after_backward(self, learn):
            if learn.iter % every == 0: next(learn.model.parameters()).grad.fill_(torch.inf)
    class Watch(Callback):
        def before_batch(self, learn): self.before = learn.model.weight.detach().clone()
        def after_batch(self, learn): seen.append((learn.stepped, not torch.equal(self.before, learn.model.weight)))
    seen,ema = [],EMACB(.5)
    cb = MixedPrecision(dtype=torch.float16)
    learn = Learner(model, DataLoaders(dls.train[:6], []), lr=1e-3, cbs=[cb, Overflow(), Watch(), ema], opt_func=opt)
    class Small(Callback):
        def before_epoch(self, learn): cb.scaler._init_scale,cb.scale = 8.,8.
    learn.fit(1, valid=False, cbs=Small())
    assert seen == [(i % every != 0,)*2 for i in range(6)] and ema.n == sum(o for o,_ in seen)

class OwnStep(Learner):
    def step(self): self.opt.step()
class OwnZero(Learner):
    def zero_grad(self): pass

@engines
@pytest.mark.parametrize('kind', [TrainLearner, MomentumLearner, OwnStep, OwnZero])
def test_a_learner_with_steps_of_its_own_is_refused_before_the_first_batch(model, dls, engine, kind):
    "Half of the engine would run, without a word"
    batches = iter(dls.train)
    learn = kind(model, DataLoaders(batches, []), F.mse_loss, .1, engine())
    with pytest.raises(ValueError, match='has steps of its own .* use Learner with'): learn.fit(1, valid=False)
    assert len(list(batches)) == len(dls.train) and learn.model is model
    learn = Learner(model, dls, cbs=engine())
    learn.backward = lambda: learn.loss.backward()
    with pytest.raises(ValueError, match=r'steps of its own \(backward\)'): learn.fit(1)

@engines
def test_a_learner_that_predicts_in_its_own_way_is_not_refused(dls, engine):
    class Twice(Learner):
        def predict(self): self.preds = self.model(self.batch[0])*2
    class InModel(nn.Linear):
        def forward(self, x): return super().forward(x)*2
    ws = []
    for kind,net in ((Twice, nn.Linear), (Learner, InModel)):
        torch.manual_seed(0)
        kind(net := net(4, 1), dls, lr=.01, cbs=engine()).fit(1)
        ws.append(own(net))
    torch.testing.assert_close(*ws, atol=1e-2, rtol=1e-2)

class Steps(Callback):
    def before_fit(self, learn): self.n = 0
    def after_step(self, learn): self.n += learn.stepped

@pytest.mark.parametrize('cbs', [lambda: (MetricsCB(), ProgressCB(), GradAccumCB(2)), lambda: (GradAccumCB(2), ProgressCB(), MetricsCB())])
def test_accumulation_goes_with_a_progress_bar(model, dls, cbs, capsys):
    "The bar has no length of its own"
    other = copy.deepcopy(model)
    Learner(model, dls, lr=.01, cbs=[TrainCB(), *cbs(), steps := Steps()]).fit(2)
    Learner(other, dls, lr=.01, cbs=[TrainCB(), GradAccumCB(2)]).fit(2)
    assert steps.n == 12 and torch.equal(own(model), own(other))
    stream = SimpleNamespace(train=(b for b in dls.train), valid=dls.valid)
    for more in ([], [ProgressCB()]):
        learn = Learner(model, stream, cbs=[TrainCB(), GradAccumCB(2), *more])
        with pytest.raises(ValueError, match='a dls.train that has a length'): learn.fit(1)

def test_a_group_that_is_cut_short_does_not_go_into_the_next_epoch(model, dls):
    class Cut(Callback):
        def after_batch(self, learn):
            if learn.training and learn.epoch == 0 and learn.iter == 3: raise CancelEpochException
    other = copy.deepcopy(model)
    Learner(model, dls, lr=.01, cbs=[TrainCB(), GradAccumCB(3), Cut()]).fit(2, valid=False)
    first = Learner(other, DataLoaders(dls.train[:3], []), lr=.01, cbs=[TrainCB(), GradAccumCB(3)])
    first.fit(1, valid=False)
    first.dls = dls
    first.fit(1, valid=False)
    torch.testing.assert_close(own(model), own(other))

def test_a_loader_that_gives_less_than_its_length_is_said(model, dls):
    class Long(list):
        def __len__(self): return super().__len__()+1
    with pytest.warns(UserWarning, match='gave 11 batches, but has the length 12: the last 3 made no step'):
        Learner(model, DataLoaders(Long(dls.train), []), lr=.01, cbs=[TrainCB(), GradAccumCB(4)]).fit(1, valid=False)

def test_what_is_refused(model, dls):
    for bad in ('fp8', None, 'bfloat16', torch.float16):
        with pytest.raises(ValueError, match="'no', 'fp16' or 'bf16'"): AccelerateCB(mixed_precision=bad)
    with pytest.raises(TypeError, match=r"write AccelerateCB\(mixed_precision='fp16'\)"): AccelerateCB('fp16')
    for bad in ('bf16', torch.bfloat16):
        with pytest.raises(TypeError, match=r'write MixedPrecision\(dtype=...\)'): MixedPrecision(bad)
    for bad in ('fp16', torch.float64, torch.float32, 16):
        with pytest.raises(TypeError, match='torch.float16 or torch.bfloat16'): MixedPrecision(dtype=bad)
    for bad in (0, -1, 1.5, '1'):
        for cb in (MixedPrecision, partial(AccelerateCB, mixed_precision='no')):
            with pytest.raises((TypeError, ValueError), match='n_inp'): cb(bad)
    for bad in (2.5, '2', None):
        with pytest.raises(TypeError, match=f'a whole number of batches, not {bad!r}'): GradAccumCB(bad)
    for bad in (0, -1):
        with pytest.raises(ValueError, match='at least 1'): GradAccumCB(bad)
    for bad in ('x', None):
        with pytest.raises(TypeError, match='max_norm is a number'): GradClipCB(bad)
    for bad in (0, -1., float('nan')):
        with pytest.raises(ValueError, match='above 0'): GradClipCB(bad)
    Learner(model, dls, lr=.01, cbs=[TrainCB(), GradAccumCB(np.int64(2)), GradClipCB(np.float32(1))]).fit(1)

def test_a_precision_that_cannot_be_does_not_break_later_ones(model, dls):
    "accelerate keeps half a state for the whole process"
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    made = AccelerateCB(mixed_precision='bf16') # before it
    AcceleratorState._reset_state()
    try: Accelerator(mixed_precision='fp8')
    except Exception: pass
    with pytest.raises(ValueError): AccelerateCB(mixed_precision='fp8')
    for cb in (made, AccelerateCB(mixed_precision='no'), AccelerateCB(mixed_precision='bf16')):
        Learner(model, dls, lr=.01, cbs=cb).fit(1)
        assert cb.acc.mixed_precision == cb.mixed_precision

EVENTS = ['before_epoch', 'before_batch', 'after_predict', 'after_loss', 'after_backward', 'after_step', 'after_batch', 'after_epoch']

@engines
@pytest.mark.parametrize('event', EVENTS)
def test_a_helper_within_a_fit_changes_nothing(dls, engine, event):
    "Neither what the engine prepared, nor autocast and what it keeps of weights, nor the loss scaling"
    def run(helper, *more):
        class Ask(Callback):
            order,orders = 50,0
            def ask(self, learn):
                seen.append(own(learn.model))
                helper(learn)
                assert torch.equal(own(learn.model), seen[-1])
        setattr(Ask, event, Ask.ask)
        seen = []
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
        few = DataLoaders(dls.train[:3], dls.valid[:2])
        cbs = [engine(), Ask(), ema := EMACB(.9), MetricsCB(), steps := Steps(), *more]
        learn = Learner(model, few, lr=.05, cbs=cbs, opt_func=optim.Adam)
        learn.fit(2)
        assert learn.model is model and learn.dls is few
        assert not torch.is_autocast_enabled('cpu') and seen and learn.cbs == cbs
        learn.fit(1)
        return own(model),own(ema.model),steps.n
    def nothing(learn): pass
    def capture(learn): learn.capture_preds()
    def find(learn): learn.lr_find(max_epochs=2)
    helpers = [(capture,), (capture, GradAccumCB(2))]
    if event not in ('after_predict', 'after_loss') and engine is not ENGINES[0]: helpers.append((find,))
    for helper,*more in helpers: # a search changes weights on which a loss is waiting for its gradients, and loses steps to overflow
        (*ours,n),(*plain,m) = run(helper, *more),run(nothing, *more)
        for a,b in zip(ours, plain): assert torch.equal(a, b)
        assert n == m

@engines
def test_a_helper_outside_a_fit(model, dls, engine):
    learn = Learner(model, dls, lr=.05, cbs=[cb := engine(), ema := EMACB(.9)])
    for _ in range(2):
        learn.capture_preds()
        learn.fit(1)
        assert learn.model is model and not torch.equal(own(ema.model), own(model))
        preds,targs = learn.capture_preds()
        with torch.no_grad(): torch.testing.assert_close(preds, torch.cat([ema.model(x) for x,_ in dls.valid]), atol=.05, rtol=.05)
    assert getattr(cb, 'was', None) in (None, False)

def test_a_fit_that_could_not_begin_is_cleaned_up(model, dls, monkeypatch):
    "Preparing fails half way, in the first fit and after others"
    cb = AccelerateCB(mixed_precision='bf16')
    learn = Learner(model, dls, lr=.01, cbs=[cb, GradAccumCB(2)])
    prepare = type(cb.acc).prepare
    for n in (0, 1): # after the model, and after the optimizer
        def fails(self, o):
            nonlocal left
            if left == 0: raise RuntimeError('no place')
            left -= 1
            return prepare(self, o)
        left = n
        monkeypatch.setattr(type(cb.acc), 'prepare', fails)
        with pytest.raises(RuntimeError, match='no place'): learn.fit(1)
        monkeypatch.undo()
        assert learn.model is model and learn.dls is dls and len(learn.cbs) == 2 and '_original_forward' not in vars(model)
        learn.fit(1)
        assert learn.model is model

lines = partial(lines_run, miniai.accel)

@engines
def test_an_interruption_anywhere_leaves_neither_autocast_nor_a_wrapped_model(model, dls, engine):
    cb,few = engine(),DataLoaders(dls.train[:1], dls.valid[:1])
    learn = Learner(model, few, lr=.01, cbs=[cb])
    learn.fit(1)
    n = lines(partial(learn.fit, 1))
    assert n > 10
    for i in range(n):
        with pytest.raises(KeyboardInterrupt): lines(partial(learn.fit, 1), i)
        assert not torch.is_autocast_enabled('cpu')
        learn.fit(1)
        assert learn.model is model and learn.dls is few and '_original_forward' not in vars(model) and not torch.is_autocast_enabled('cpu')

def test_autocast_of_the_users_own_stays(model, dls):
    with torch.autocast('cpu', torch.bfloat16):
        Learner(model, dls, lr=.01, cbs=MixedPrecision()).fit(1)
        assert torch.is_autocast_enabled('cpu')
    assert not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('engine', [TrainCB, *ENGINES])
def test_batches_that_are_dicts_or_bare_tensors(dls, engine):
    dicts = DataLoaders(*[[dict(x=x, y=y) for x,y in dl] for dl in (dls.train, dls.valid)])
    bare = DataLoaders(*[[x for x,_ in dl] for dl in (dls.train, dls.valid)])
    for data,loss in ((dls, F.mse_loss), (dicts, F.mse_loss), (bare, lambda p: p.square().mean())):
        torch.manual_seed(0)
        start = own(net := nn.Linear(4, 1))
        learn = Learner(net, data, loss, .01, [engine(), GradAccumCB(2), MetricsCB(), steps := Steps()])
        learn.fit(2)
        assert steps.n >= 1 and not torch.equal(own(net), start)
        if data is dls: expected = own(net)
        if data is dicts: assert torch.equal(own(net), expected)

def test_shares_of_batches_of_every_kind():
    from miniai.accel import _rows, _Share
    x,y = torch.arange(5),np.arange(5)*10
    batches = [(x, y), dict(a=x, names=list('abcde'), n=5, w=torch.ones(10)), SimpleNamespace(x=x, scale=torch.tensor(2.)), x]
    tup,dic,obj,bare = [_rows(b, 5, slice(1, None, 2)) for b in batches]
    assert tup[0].tolist() == dic['a'].tolist() == obj.x.tolist() == bare.tolist() == [1, 3] and tup[1].tolist() == [10, 30]
    assert dic['names'] == ['b', 'd'] and dic['n'] == 5 and len(dic['w']) == 10 and obj.scale == 2
    class Loader(list): bs = 7
    share = _Share(Loader(batches), SimpleNamespace(process_index=0, num_processes=1))
    assert len(share) == 4 and share.bs == 7
    for b in share: assert share.weight == 1

@pytest.mark.parametrize('engine', [TrainCB, *ENGINES[1:]])
def test_optimizers_made_by_hand(model, dls, engine):
    other = copy.deepcopy(model)
    for net,opt in ((model, HandSGD), (other, optim.SGD)):
        Learner(net, dls, lr=.01, cbs=[engine(), GradClipCB(.5), GradAccumCB(2)], opt_func=opt).fit(2)
    torch.testing.assert_close(own(model), own(other))

def test_loss_scaling_refuses_what_it_cannot_look_into(model, dls):
    batches = iter(dls.train)
    learn = Learner(model, DataLoaders(batches, []), lr=.01, cbs=MixedPrecision(dtype=torch.float16), opt_func=HandSGD)
    with pytest.raises(TypeError, match='not a HandSGD: choose bfloat16'): learn.fit(1, valid=False)
    assert len(list(batches)) == len(dls.train)
