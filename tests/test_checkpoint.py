"Fits that go on where they were interrupted, to the same end, and checkpoints that are damaged or of another fit"
from functools import partial

import pytest, torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from miniai.accel import AccelerateCB, GradAccumCB, MixedPrecision
from miniai.activations import set_seed
from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders, TensorLoader
from miniai.ema import EMACB
from miniai.learner import Callback, Learner, TrainCB
from miniai.sgd import BatchSchedCB

pytestmark = pytest.mark.filterwarnings('ignore:mixed precision is meant')

def net():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 1))

class PowerCut(Callback):
    order = CheckpointCB.order+1
    def __init__(self, after): self.after = after
    def after_batch(self, learn):
        self.after -= learn.training
        if not self.after: raise KeyboardInterrupt

def tensor_loader(x, y): return TensorLoader(x, y, bs=8, shuffle=True)
def torch_loader(x, y): return DataLoader(TensorDataset(x, y), 8, shuffle=True)

def fit(*cbs, loader=tensor_loader, seed=0, engine=TrainCB, n=3):
    set_seed(0)
    x,model = torch.randn(50, 4),net()
    dls = DataLoaders(loader(x, x.sum(1, keepdim=True)), loader(x, x.sum(1, keepdim=True)))
    sched = BatchSchedCB(partial(optim.lr_scheduler.OneCycleLR, max_lr=.01, total_steps=21))
    learn = Learner(model, dls, F.mse_loss, .01, [engine(), sched, EMACB(.9), *cbs], optim.AdamW)
    set_seed(seed)
    try: learn.fit(n)
    except KeyboardInterrupt: pass
    return torch.cat([o.float().flatten() for o in model.state_dict().values()])

@pytest.mark.parametrize('loader', [tensor_loader, torch_loader])
@pytest.mark.parametrize('engine', [TrainCB, partial(MixedPrecision, dtype=torch.float16), partial(AccelerateCB, mixed_precision='no')])
@pytest.mark.parametrize('after', [3, 5, 7, 10, 14])
def test_a_resumed_fit_ends_as_if_nothing_had_been(tmp_path, loader, engine, after):
    whole = fit(loader=loader, engine=engine)
    cut = fit(CheckpointCB(tmp_path, every=1), PowerCut(after), loader=loader, engine=engine)
    assert not torch.equal(cut, whole)
    def resumed(seed): return fit(CheckpointCB(tmp_path, every=1, resume=True), loader=loader, engine=engine, seed=seed)
    assert torch.equal(resumed(1), whole)
    assert torch.equal(resumed(2), whole), 'nothing is left to do'

def test_watching_does_not_change_the_fit(tmp_path): assert torch.equal(fit(CheckpointCB(tmp_path, every=2)), fit())

def test_a_fit_that_is_interrupted_while_it_writes(tmp_path, monkeypatch):
    whole = fit()
    fit(CheckpointCB(tmp_path, every=3), PowerCut(5))
    real = torch.save
    def interrupted(obj, path, **kw):
        path.write_bytes(b'half')
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, 'save', interrupted)
    fit(CheckpointCB(tmp_path, every=1, resume=True))
    monkeypatch.setattr(torch, 'save', real)
    assert [p.name for p in tmp_path.glob('step-*')] == ['step-000000003']
    assert torch.equal(fit(CheckpointCB(tmp_path, resume=True)), whole)

@pytest.mark.parametrize('name', ['model.safetensors', 'rest.pt', 'checksums.json'])
@pytest.mark.parametrize('damage', [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-3]), lambda p: p.write_bytes(b'')])
def test_damaged_files_are_passed_over(tmp_path, name, damage):
    whole = fit()
    fit(CheckpointCB(tmp_path, every=2), PowerCut(6))
    damage(max(tmp_path.glob('step-*'))/name)
    with pytest.warns(UserWarning, match='step-000000006 is damaged'): resumed = fit(CheckpointCB(tmp_path, resume=True))
    assert torch.equal(resumed, whole)

def test_the_last_k_are_kept(tmp_path):
    fit(CheckpointCB(tmp_path, every=2, keep=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-000000020', 'step-000000021']

def test_other_callbacks_and_other_fits(tmp_path):
    fit(CheckpointCB(tmp_path))
    with pytest.raises(ValueError, match='checkpoints of another fit'): fit(CheckpointCB(tmp_path))
    with pytest.raises(ValueError, match='has the callbacks'): fit(EMACB(), CheckpointCB(tmp_path, resume=True))
    cb = CheckpointCB(tmp_path)
    dls = DataLoaders([], [(torch.randn(3, 4), torch.randn(3, 1))])
    Learner(net(), dls, cbs=[TrainCB(), cb]).fit(1, train=False) # evaluation touches nothing
    for bad in (dict(keep=0), dict(every=0)):
        with pytest.raises(ValueError, match='at least 1'): CheckpointCB(tmp_path, **bad)

def test_the_scale_of_accelerate_is_in_the_checkpoint(tmp_path):
    "As fp16 has it on CUDA; here the scaler is put in by hand"
    def engine():
        cb = AccelerateCB(mixed_precision='no')
        cb.acc.scaler = torch.amp.GradScaler('cpu', init_scale=8., growth_interval=4)
        engines.append(cb)
        return cb
    engines = []
    whole = fit(engine=engine)
    fit(CheckpointCB(tmp_path, every=1), PowerCut(9), engine=engine)
    assert torch.equal(fit(CheckpointCB(tmp_path, resume=True), engine=engine, seed=1), whole)
    assert [cb.scaler.get_scale() for cb in engines] == [8.*2**(21//4), 8.*2**(9//4), 8.*2**(21//4)]

def test_no_checkpoint_within_a_group(tmp_path):
    whole = fit(GradAccumCB(3))
    fit(GradAccumCB(3), CheckpointCB(tmp_path, every=2, keep=9), PowerCut(13))
    assert [int(p.name[5:]) for p in sorted(tmp_path.iterdir())] == [3, 6, 7, 10, 13]
    assert torch.equal(fit(GradAccumCB(3), CheckpointCB(tmp_path, resume=True), seed=1), whole)

def test_a_checkpoint_of_another_model_says_what_differs(dls, model, tmp_path):
    def fit_(model): Learner(model, dls, cbs=[TrainCB(), CheckpointCB(tmp_path, resume=True)]).fit(1, valid=False)
    fit_(model)
    with pytest.raises(ValueError, match='another model') as e: fit_(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]))
    assert str(e.value).splitlines() == ['the checkpoint is of another model:', *[
        f'{i}.{k}: nothing in the checkpoint, {shape} in the model' for i in range(2) for k,shape in (('weight', (4, 4)), ('bias', (4,)))],
        '2.weight: nothing in the checkpoint, (4, 4) in the model', 'and 5 more']

def test_checkpoints_of_a_compiled_model_are_the_models(dls, model, tmp_path):
    def fit_(model): Learner(model, dls, cbs=[TrainCB(), CheckpointCB(tmp_path, resume=True)]).fit(1, valid=False)
    fit_(torch.compile(model, backend='eager'))
    fit_(other := nn.Linear(4, 1)) # nothing is left to do
    assert torch.equal(other.weight, model.weight)
