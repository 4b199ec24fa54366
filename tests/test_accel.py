"Mixed precision, clipping, accumulation, and several processes"
import copy, os, subprocess, sys
from functools import partial

import pytest, torch
import torch.nn.functional as F
from torch import optim

import miniai.accel, miniai.checkpoint, miniai.ema
from miniai.accel import AccelerateCB, GradAccumCB, GradClipCB, MixedPrecision
from miniai.datasets import DataLoaders
from miniai.ema import EMACB
from miniai.learner import Callback, DeviceCB, Learner, TrainCB

pytestmark = pytest.mark.filterwarnings('ignore:mixed precision is meant')

def test_averages_and_checkpoints_are_still_found_here():
    assert miniai.accel.EMACB is miniai.ema.EMACB and miniai.accel.CheckpointCB is miniai.checkpoint.CheckpointCB
    assert {'EMACB', 'CheckpointCB'} <= set(miniai.accel.__all__)

SCRIPT = """
import sys, torch, torch.nn.functional as F
from pathlib import Path
from accelerate import notebook_launcher
from torch import nn
from miniai.activations import set_seed
from miniai.accel import AccelerateCB
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

lines,seen,folder = [],[],Path(sys.argv[2])
def train():
    set_seed(1)
    x,model = torch.randn(100, 20),nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))
    y = (x[:,0] > 0).long() + (x[:,1] > 0)
    dls = DataLoaders(TensorLoader(x, y, bs=17, shuffle='shuffle' in sys.argv), TensorLoader(x, y, bs=35))
    engine,checkpoints = AccelerateCB(mixed_precision='no'),CheckpointCB(folder/'checkpoints')
    cbs = [engine, MetricsCB(accuracy=accuracy), ProgressCB(), Losses(), Seen(), checkpoints]
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

def test_two_processes_learn_what_one_does(tmp_path):
    outs = {n: launch(n, tmp_path/str(n)) for n in (1, 2)}
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
