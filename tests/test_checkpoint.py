"Fits that go on where they were interrupted, to the same end, and checkpoints that are damaged or of another fit"
import errno, hashlib, json, os, random, shutil, signal, subprocess, sys, threading, warnings, zipfile
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset

from miniai.accel import AccelerateCB, GradAccumCB, MixedPrecision
from miniai.activations import set_seed
from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders, TensorLoader
from miniai.ema import EMACB
from miniai.init import BatchTransformCB
from miniai.learner import Callback, CancelEpochException, CancelFitException, Learner, MetricsCB, TrainCB
from miniai.sgd import BatchSchedCB, EpochSchedCB, RecorderCB

pytestmark = pytest.mark.filterwarnings('ignore:mixed precision is meant', 'ignore:OneCycleLR ended after the training')

@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch): monkeypatch.setattr(os, 'fsync', lambda fd: None)

def net():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 1))

class PowerCut(Callback):
    order = CheckpointCB.order+1
    def __init__(self, after): self.after = after
    def after_batch(self, learn):
        self.after -= learn.training
        if not self.after: raise KeyboardInterrupt

def names(folder): return sorted(p.name for p in folder.iterdir() if p.name != '.lock')
def newest(folder): return max(folder.glob('step-*'))

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
    def interrupted(fd): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', interrupted)
        fit(CheckpointCB(tmp_path, every=1, resume=True))
    assert names(tmp_path) == ['step-000000003']
    assert torch.equal(fit(CheckpointCB(tmp_path, resume=True)), whole)

class Killed(BaseException): pass
FILE_CALLS = {'open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'shutil.rmtree'}
calls_left = None
def _kill(event, args):
    "From a certain call on nothing is done any more, and nothing tidied up: as if the process was gone"
    global calls_left
    if calls_left is None or event not in FILE_CALLS: return
    calls_left -= 1
    if calls_left < 0: raise Killed
sys.addaudithook(_kill)

def test_killed_at_any_call_of_the_file_system(tmp_path):
    "An epoch has a multiple of `every` batches, so that a step is written twice; and one checkpoint is kept"
    global calls_left
    def fit_(folder):
        torch.manual_seed(0)
        x = torch.randn(16, 4)
        dls,model = DataLoaders(TensorLoader(x, x.sum(1, keepdim=True), bs=4, shuffle=True), []),nn.Linear(4, 1)
        cbs = [TrainCB(), CheckpointCB(folder, every=2, keep=1, resume=True)]
        Learner(model, dls, F.mse_loss, .01, cbs).fit(1, valid=False)
        return model.weight
    whole,n = fit_(tmp_path/'whole'),0
    while True:
        folder,calls_left = tmp_path/str(n),n
        try: fit_(folder)
        except Killed: pass
        finished,calls_left = calls_left >= 0,None
        with warnings.catch_warnings():
            warnings.simplefilter('error') # of damage
            assert torch.equal(fit_(folder), whole), n
        assert set(names(folder)) <= {'step-000000004', 'step-000000004-1'}
        n += 1
        if finished: break
    assert n > 40

SCRIPT = """
import os, signal, sys, torch, torch.nn.functional as F
from functools import partial
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset
from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders
from miniai.learner import Callback, Learner, TrainCB
from miniai.sgd import BatchSchedCB

class Kill(Callback):
    order = 200
    def after_batch(self, learn):
        if learn.training and learn.epoch == 1 and learn.iter == 2 and len(sys.argv) > 2: os.kill(os.getpid(), signal.SIGKILL)

def fit(folder):
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    train = DataLoader(data, 8, shuffle=True, num_workers=1, generator=torch.Generator().manual_seed(5))
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(.5), nn.Linear(8, 1))
    sched = BatchSchedCB(partial(optim.lr_scheduler.OneCycleLR, max_lr=.1, total_steps=15))
    cbs = [TrainCB(), sched, Kill(), CheckpointCB(folder, every=2, resume=True)]
    Learner(model, DataLoaders(train, [next(iter(train))]), F.mse_loss, cbs=cbs, opt_func=optim.AdamW).fit(3)
    return torch.cat([p.detach().flatten() for p in model.parameters()])

resumed = fit(sys.argv[1])
print('the same' if torch.equal(resumed, fit(sys.argv[1]+'-whole')) else 'not the same')
"""

def test_a_process_that_is_killed_while_its_workers_run(tmp_path):
    def run(*args): return subprocess.run([sys.executable, '-c', SCRIPT, *map(str, args)], text=True, capture_output=True)
    cut = run(tmp_path/'cut', 'kill')
    assert cut.returncode == -signal.SIGKILL and not cut.stdout
    told,end = run(tmp_path/'cut').stdout.splitlines()
    assert 'step-000000008 is from after batch 3 of 5 in epoch 1, and the fit goes on' in told
    assert end == 'the same'

class Noisy(Dataset):
    "Draws from generators of its own, and from NumPy's"
    def __init__(self): self.tfms = [dict(a=np.random.default_rng(1)), partial(random.Random.random, random.Random(2))]
    def __len__(self): return 32
    def __getitem__(self, i):
        noise = self.tfms[0]['a'].random() + self.tfms[1]() + np.random.rand()
        return torch.tensor([float(i)]),torch.tensor([noise], dtype=torch.float32)

def plain_set(): return TensorDataset(torch.arange(32.)[:,None], torch.ones(32, 1))
def gen(): return torch.Generator().manual_seed(3)
def weighted(): return torch.utils.data.WeightedRandomSampler(torch.ones(32), 32, replacement=False, generator=gen())
def batch_sampler():
    return torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(range(32), generator=gen()), 8, drop_last=False)
def augmenting():
    g = gen()
    def noisy(x): return x + .1*torch.rand(x.shape, generator=g)
    return TensorLoader(torch.arange(32.)[:,None], torch.ones(32, 1), bs=8, shuffle=True, x_tfm=noisy)

LOADERS = {
    'its own generator': lambda: DataLoader(plain_set(), 8, shuffle=True, generator=gen()),
    'a worker': lambda: DataLoader(plain_set(), 8, shuffle=True, num_workers=1),
    'persistent workers': lambda: DataLoader(plain_set(), 8, shuffle=True, num_workers=1, persistent_workers=True),
    'both': lambda: DataLoader(plain_set(), 8, shuffle=True, num_workers=1, persistent_workers=True, generator=gen()),
    'a sampler with a generator': lambda: DataLoader(plain_set(), 8, sampler=weighted()),
    'a batch sampler': lambda: DataLoader(plain_set(), batch_sampler=batch_sampler()),
    'a data set that draws': lambda: DataLoader(torch.utils.data.Subset(Noisy(), range(32)), 8, shuffle=True),
    'a data set that draws in workers': lambda: DataLoader(Noisy(), 8, shuffle=True, num_workers=2),
    'a closure': augmenting,
}

@pytest.mark.parametrize('name', LOADERS)
@pytest.mark.parametrize('epoch', [0, 1])
def test_each_image_of_an_interrupted_epoch_once(tmp_path, name, epoch):
    "Loaders with generators of their own, and with workers; validation has persistent workers"
    def run(folder, seed=0, cut=False):
        class Watch(Callback):
            order = 200
            def after_batch(self, learn):
                if not learn.training or learn.epoch != epoch: return
                seen.extend(learn.batch[0].flatten().tolist())
                if cut and learn.iter == 1: raise KeyboardInterrupt
        set_seed(0)
        model,seen = nn.Sequential(nn.Linear(1, 4), nn.Dropout(.5), nn.Linear(4, 1)),[]
        set_seed(seed)
        dls = DataLoaders(LOADERS[name](), DataLoader(plain_set(), 16, num_workers=1, persistent_workers=True))
        learn = Learner(model, dls, lr=1e-5, cbs=[TrainCB(), CheckpointCB(folder, every=1, resume=True), Watch()])
        try: learn.fit(3)
        except KeyboardInterrupt: pass
        return seen,torch.cat([p.detach().flatten() for p in model.parameters()])
    whole,weights = run(tmp_path/'whole')
    first,_ = run(tmp_path/'cut', cut=True)
    rest,resumed = run(tmp_path/'cut', seed=1)
    assert first+rest == whole and len({int(x) for x in whole}) == 32
    assert torch.equal(resumed, weights)

@pytest.mark.parametrize('name', ['model.safetensors', 'rest.pt', 'checksums.json'])
@pytest.mark.parametrize('damage', [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-3]), lambda p: p.write_bytes(b''),
    lambda p: p.write_bytes(p.read_bytes()[:-1]+b'?')])
def test_damaged_files_are_passed_over(tmp_path, name, damage):
    whole = fit()
    fit(CheckpointCB(tmp_path, every=2), PowerCut(6))
    damage(newest(tmp_path)/name)
    with pytest.warns(UserWarning, match='step-000000006 is damaged'): resumed = fit(CheckpointCB(tmp_path, resume=True))
    assert torch.equal(resumed, whole)

def with_sums(path, change):
    sums = json.loads((path/'checksums.json').read_text())
    (path/'checksums.json').write_text(json.dumps(change(sums)))

def bomb(path):
    "A rest.pt of a few kB that would take 100 MB, with the right checksum"
    with zipfile.ZipFile(path/'rest.pt', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('rest/data.pkl', b'0'*10**8)
    seal(path, 'rest.pt')

class Evil:
    def __reduce__(self): return os.mkdir, ('evil',)
def code(path):
    torch.save(Evil(), path/'rest.pt')
    seal(path, 'rest.pt')

def seal(path, nm):
    data = (path/nm).read_bytes()
    with_sums(path, lambda sums: sums | {nm: dict(size=len(data), sha256=hashlib.sha256(data).hexdigest())})

def link(path):
    (path/'model.safetensors').rename(elsewhere := path.parent/'elsewhere')
    (path/'model.safetensors').symlink_to(elsewhere)

def fifo(path):
    (path/'rest.pt').unlink()
    os.mkfifo(path/'rest.pt')

HOSTILE = {
    'no checksums': lambda path: with_sums(path, lambda sums: {}),
    'one is missing': lambda path: with_sums(path, lambda sums: {k: o for k,o in sums.items() if k != 'model.safetensors'}),
    'of a file elsewhere': lambda path: with_sums(path, lambda sums: sums | {'../elsewhere': dict(size=0, sha256='')}),
    'of a file that is not there': lambda path: with_sums(path, lambda sums: sums | {'more.safetensors': dict(size=0, sha256='')}),
    'a list': lambda path: with_sums(path, list),
    'a number': lambda path: with_sums(path, lambda sums: 3),
    'no sizes': lambda path: with_sums(path, lambda sums: {k: {} for k in sums}),
    'a file too many': lambda path: shutil.copy(path/'model.safetensors', path/'more.safetensors'),
    'large checksums': lambda path: (path/'checksums.json').write_bytes(b' '*2*10**6 + (path/'checksums.json').read_bytes()),
    'nested': lambda path: (path/'checksums.json').write_text('['*100_000),
    'a link': link, 'a pipe': fifo, 'a zip bomb': bomb, 'code in a pickle': code,
}

@pytest.mark.parametrize('name', HOSTILE)
def test_what_was_tampered_with_is_not_read(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = fit()
    fit(CheckpointCB('c', every=2), PowerCut(6))
    HOSTILE[name](newest(Path('c')))
    with pytest.warns(UserWarning, match='step-000000006 is damaged'): assert torch.equal(fit(CheckpointCB('c', resume=True)), whole)
    assert not Path('evil').exists()

def test_hidden_files_of_the_system_do_no_harm(tmp_path):
    fit(CheckpointCB(tmp_path, every=2), PowerCut(6))
    (newest(tmp_path)/'.DS_Store').write_text('x')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(fit(CheckpointCB(tmp_path, resume=True)), fit())

def test_checkpoints_of_an_earlier_version_are_refused(tmp_path):
    fit(CheckpointCB(tmp_path))
    with_sums(newest(tmp_path), lambda sums: {k: o['sha256'] for k,o in sums.items()})
    with pytest.raises(NotImplementedError, match='earlier version of miniai'): fit(CheckpointCB(tmp_path, resume=True))

@pytest.mark.parametrize('name', ['model.safetensors', 'checksums.json'])
def test_a_file_that_may_not_be_read_is_not_damaged(tmp_path, name, monkeypatch):
    fit(CheckpointCB(tmp_path))
    real = Path.read_bytes
    def read_bytes(path):
        if path.name == name: raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return real(path)
    monkeypatch.setattr(Path, 'read_bytes', read_bytes)
    with pytest.raises(PermissionError): fit(CheckpointCB(tmp_path, resume=True))
    assert len(names(tmp_path)) == 3

def test_the_last_k_are_kept(tmp_path):
    fit(CheckpointCB(tmp_path, every=2, keep=2))
    assert names(tmp_path) == ['step-000000020', 'step-000000021']
    fit(CheckpointCB(tmp_path/'one', every=7, keep=1))
    assert names(tmp_path/'one') == ['step-000000021-1']

def test_after_a_fall_back_the_new_ones_are_kept_and_the_damaged_go(tmp_path):
    fit(CheckpointCB(tmp_path, every=2, keep=3), PowerCut(10))
    for step in (8, 10): (tmp_path/f'step-{step:09d}'/'rest.pt').write_bytes(b'')
    with pytest.warns(UserWarning, match='damaged'): fit(CheckpointCB(tmp_path, keep=2, every=9, resume=True), PowerCut(1))
    assert names(tmp_path) == ['step-000000007', 'step-000000008', 'step-000000010'], 'nothing was written'
    with pytest.warns(UserWarning, match='damaged'): fit(CheckpointCB(tmp_path, keep=2, every=9, resume=True), PowerCut(8))
    assert names(tmp_path) == ['step-000000009', 'step-000000014'], 'the epoch ended'
    assert torch.equal(fit(CheckpointCB(tmp_path, resume=True)), fit())

def test_all_are_damaged(tmp_path):
    fit(CheckpointCB(tmp_path, every=2), PowerCut(4))
    for p in tmp_path.glob('step-*'): (p/'rest.pt').unlink()
    with pytest.warns(UserWarning, match='damaged'): assert torch.equal(fit(CheckpointCB(tmp_path, resume=True)), fit())

def test_strangers_are_left_alone(tmp_path):
    (tmp_path/'step-old').mkdir()
    (tmp_path/'step-000000099').write_text('a file')
    (tmp_path/'step-000000098').symlink_to(tmp_path/'step-old')
    (tmp_path/'notes.txt').write_text('mine')
    (tmp_path/'step-000000007').write_text('where a checkpoint would be')
    strangers = set(names(tmp_path))
    whole = fit(CheckpointCB(tmp_path, keep=2))
    assert torch.equal(fit(CheckpointCB(tmp_path, keep=2, resume=True), seed=1), whole)
    assert set(names(tmp_path)) == strangers | {'step-000000014', 'step-000000021'}

def test_numpy_numbers_are_written_as_plain_ones(tmp_path):
    def fit_(*cbs):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        sched = BatchSchedCB(partial(lr_scheduler.LambdaLR, lr_lambda=lambda s: np.cos(s/100)))
        x = torch.ones(48, 4)
        dls = DataLoaders(TensorLoader(x, x[:,:1], bs=8), [])
        class Tell(Callback):
            "Has all that may be in a state"
            kept = None
            def state_dict(self): return dict(a=np.arange(3), b=[np.float32(2), (np.int64(3), None)], c={np.int64(4): torch.arange(9)[3:5]})
            def load_state_dict(self, state): Tell.kept = state
        try: Learner(model, dls, F.mse_loss, np.float64(.01), [TrainCB(), sched, Tell(), *cbs]).fit(2, valid=False)
        except KeyboardInterrupt: pass
        if Tell.kept:
            assert repr(Tell.kept) == "{'a': [0, 1, 2], 'b': [2.0, (3, None)], 'c': {4: tensor([3, 4])}}"
        return model.weight
    whole = fit_()
    fit_(CheckpointCB(tmp_path, every=3), PowerCut(8))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(fit_(CheckpointCB(tmp_path, resume=True)), whole)

@pytest.mark.parametrize('thing', [lambda: Path('x'), lambda: object(), lambda: print, lambda: (lambda: 3)])
def test_a_state_that_cannot_be_read_again_is_refused_early(tmp_path, dls, model, thing):
    class Odd(Callback):
        def state_dict(self): return dict(a=thing())
        def load_state_dict(self, state): pass
    learn,before = Learner(model, dls, cbs=[TrainCB(), Odd(), CheckpointCB(tmp_path)]),model.weight.clone()
    with pytest.raises(TypeError, match='the state of Odd cannot be written'): learn.fit(1)
    assert torch.equal(model.weight, before)

def test_a_folder_that_cannot_serve_is_refused_before_the_first_batch(tmp_path, dls, model, monkeypatch):
    monkeypatch.setattr(CheckpointCB, 'patience', .1)
    before = model.weight.clone()
    def refused(exc, match, *cbs, **kw):
        with pytest.raises(exc, match=match): Learner(model, dls, cbs=[TrainCB(), *cbs], **kw).fit(1)
        assert torch.equal(model.weight, before)
    (tmp_path/'file').write_text('x')
    refused(OSError, 'no checkpoint can be written into .*file', CheckpointCB(tmp_path/'file'))
    refused(OSError, 'no checkpoint can be written into .*file', CheckpointCB(tmp_path/'file'/'below', resume=True))
    with FileLock((tmp_path/'used'/'.lock').parent.mkdir() or tmp_path/'used'/'.lock'):
        refused(RuntimeError, 'used is in use by another fit', CheckpointCB(tmp_path/'used'))
    refused(ValueError, 'two CheckpointCBs', CheckpointCB(tmp_path/'a'), CheckpointCB(tmp_path/'b'/'..'/'a'))
    refused(ValueError, 'this fit has no optimizer', CheckpointCB(tmp_path/'a'), opt_func=None)
    class SGD:
        def __init__(self, params, lr): pass
        def step(self): pass
        def zero_grad(self): pass
    refused(ValueError, 'a SGD without state_dict', CheckpointCB(tmp_path/'a'), opt_func=SGD)
    assert not (tmp_path/'a').exists()
    Learner(model, dls, cbs=[TrainCB(), CheckpointCB(tmp_path/'a')]).fit(1)

def test_a_folder_that_is_read_only(tmp_path, dls, model):
    (folder := tmp_path/'locked').mkdir(mode=0o500)
    root = os.geteuid() == 0
    if root: os.seteuid(65534) # root may write anywhere
    try:
        with pytest.raises(PermissionError, match='no checkpoint can be written into .*locked'):
            Learner(model, dls, cbs=[TrainCB(), CheckpointCB(folder)]).fit(1)
    finally:
        if root: os.seteuid(0)

def test_a_folder_whose_fit_ends_while_another_waits(tmp_path, dls, model):
    lock = FileLock(tmp_path/'.lock', thread_local=False)
    lock.acquire()
    timer = threading.Timer(.3, lock.release)
    timer.start()
    Learner(model, dls, cbs=[TrainCB(), CheckpointCB(tmp_path)]).fit(1)
    timer.join()

def test_a_killed_process_leaves_no_lock(tmp_path, dls, model):
    code = 'import os, signal, sys; from filelock import FileLock; FileLock(sys.argv[1]).acquire(); os.kill(os.getpid(), signal.SIGKILL)'
    assert subprocess.run([sys.executable, '-c', code, str(tmp_path/'.lock')]).returncode == -signal.SIGKILL
    (tmp_path/'.unfinished').mkdir()
    (tmp_path/'.unfinished'/'rest.pt').write_text('half')
    Learner(model, dls, cbs=[TrainCB(), CheckpointCB(tmp_path)]).fit(1)
    assert names(tmp_path) == ['step-000000011']

def test_the_lock_goes_with_a_fit_that_fails(tmp_path, dls, model):
    class Oops(Callback):
        def after_loss(self, learn): raise ZeroDivisionError
    for _ in range(2):
        with pytest.raises(ZeroDivisionError): Learner(model, dls, cbs=[TrainCB(), Oops(), CheckpointCB(tmp_path)]).fit(1)
    with FileLock(tmp_path/'.lock', timeout=0): pass

def test_a_full_disk_is_said(tmp_path):
    "Here as a limit to the size of files, which the system enforces in the same way"
    resource = pytest.importorskip('resource')
    fit(CheckpointCB(tmp_path, every=2), PowerCut(4))
    had = names(tmp_path)
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(OSError, match=f'{tmp_path}/step-000000006 could not be written .*older ones stand') as e:
            fit(CheckpointCB(tmp_path, every=2, resume=True))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.errno == errno.EFBIG and names(tmp_path) == had
    assert torch.equal(fit(CheckpointCB(tmp_path, resume=True)), fit())

BAD = dict(keep=(0, 1.5, None, True), every=(0, 2.5, '3'), folder=('', None, 3, Path), resume=('checkpoints', 1))
@pytest.mark.parametrize('bad', [{k: v} for k,vs in BAD.items() for v in vs], ids=str)
def test_arguments_are_checked_where_they_are_given(bad):
    with pytest.raises((TypeError, ValueError), match=next(iter(bad))): CheckpointCB(**(dict(folder='never') | bad))
    assert not Path('never').exists()

def test_evaluation_and_helpers_touch_nothing(tmp_path, dls, model):
    cb = CheckpointCB(tmp_path/'c', resume=True)
    learn = Learner(model, dls, cbs=[TrainCB(), cb, rec := RecorderCB(lr=lambda o: o.pg['lr'])])
    learn.fit(1, train=False)
    learn.lr_find()
    learn.fit_aside(n_epochs=2, train=True, valid=True, opt_func=optim.SGD, lr=0.)
    assert not (tmp_path/'c').exists()
    before = model.weight.clone()
    learn.fit(2)
    assert len(rec.recs['lr']) == 22 and not torch.equal(model.weight, before)
    had = names(tmp_path/'c')
    learn.lr_find()
    learn.fit_aside(valid=True)
    learn.fit(1, train=False)
    assert names(tmp_path/'c') == had and len(cb.plans) == 1

class Epochs(Callback):
    "Which epochs were trained"
    def __init__(self): self.seen = []
    def after_epoch(self, learn):
        if learn.training: self.seen.append(learn.epoch)

def test_a_second_fit_of_the_same_learner_trains(tmp_path, dls, model):
    for resume in (True, False):
        cbs = [TrainCB(), CheckpointCB(tmp_path/str(resume), keep=9, resume=resume), epochs := Epochs()]
        learn = Learner(model, dls, cbs=cbs)
        learn.fit(2)
        weights = model.weight.clone()
        learn.fit(3)
        assert epochs.seen == [0, 1, 0, 1, 2] and not torch.equal(model.weight, weights)
        assert names(tmp_path/str(resume)) == [f'step-{11*i:09d}' for i in range(1, 6)]

def two_fits(folder, *cbs, cut=None, resume=True, between=lambda learn: None, first=2):
    "A script with two fits, run again after an interruption"
    set_seed(0)
    x,model = torch.randn(50, 4),net()
    dls = DataLoaders(TensorLoader(x, x.sum(1, keepdim=True), bs=8, shuffle=True), TensorLoader(x, x.sum(1, keepdim=True), bs=8))
    epochs = Epochs()
    cbs = [TrainCB(), EMACB(.9), epochs, CheckpointCB(folder, every=2, resume=resume), *cbs]
    learn = Learner(model, dls, F.mse_loss, .01, cbs, optim.AdamW)
    try:
        if cut: learn.cbs.append(PowerCut(cut))
        learn.fit(first)
        between(learn)
        learn.fit(3, lr=.005, cbs=EpochSchedCB(partial(lr_scheduler.ExponentialLR, gamma=.5)))
    except KeyboardInterrupt: pass
    return torch.cat([o.float().flatten() for o in model.state_dict().values()]),epochs.seen

@pytest.mark.parametrize('cut', [5, 7, 14, 15, 21, 24, 35])
def test_a_script_with_two_fits_that_is_run_again(tmp_path, cut, capsys):
    whole,_ = two_fits(tmp_path/'whole')
    cut_,_ = two_fits(tmp_path/'cut', cut=cut)
    assert cut == 35 or not torch.equal(cut_, whole)
    capsys.readouterr()
    resumed,seen = two_fits(tmp_path/'cut')
    assert torch.equal(resumed, whole), seen
    said = capsys.readouterr().out
    assert ('is of fit 2, so this fit 1 was completed' in said) == (cut > 15)
    assert torch.equal(two_fits(tmp_path/'cut')[0], whole)

def test_a_model_that_is_changed_between_two_fits(tmp_path):
    def between(learn): learn.model.append(nn.Linear(1, 1))
    whole,_ = two_fits(tmp_path/'whole', between=between)
    two_fits(tmp_path/'cut', cut=24, between=between)
    assert torch.equal(two_fits(tmp_path/'cut', between=between)[0], whole)

def test_an_interrupted_fit_that_is_called_again(tmp_path):
    "In a notebook: Ctrl-C, and the same cell once more"
    whole = fit()
    set_seed(0)
    x,model = torch.randn(50, 4),net()
    dls = DataLoaders(tensor_loader(x, x.sum(1, keepdim=True)), tensor_loader(x, x.sum(1, keepdim=True)))
    sched = BatchSchedCB(partial(optim.lr_scheduler.OneCycleLR, max_lr=.01, total_steps=21))
    cbs = [TrainCB(), sched, EMACB(.9), CheckpointCB(tmp_path, every=2, resume=True)]
    learn = Learner(model, dls, F.mse_loss, .01, cbs, optim.AdamW)
    set_seed(0)
    for after in (3, 6):
        with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=PowerCut(after))
    try: raise ValueError
    except ValueError: learn.fit(3) # within an except, too
    assert torch.equal(torch.cat([o.float().flatten() for o in model.state_dict().values()]), whole)
    assert len(cbs[-1].plans) == 1

def test_a_fit_that_is_ended_early_is_over(tmp_path):
    "Run again, the script comes to the same end"
    class Early(Callback):
        def after_epoch(self, learn):
            if not learn.training and learn.epoch == 1: raise CancelFitException
    whole,seen = two_fits(tmp_path/'whole', Early(), first=5)
    assert seen == [0, 1, 0, 1]
    for cut in (9, 13, 18, 23):
        two_fits(tmp_path/str(cut), Early(), first=5, cut=cut)
        assert torch.equal(two_fits(tmp_path/str(cut), Early(), first=5)[0], whole), cut

def test_epochs_that_are_cut_short_are_written_too(tmp_path):
    class Short(Callback):
        def after_batch(self, learn):
            if learn.training and learn.iter == 3: raise CancelEpochException
    whole = fit(Short())
    fit(Short(), CheckpointCB(tmp_path, keep=9), PowerCut(10))
    assert names(tmp_path) == ['step-000000003', 'step-000000006', 'step-000000009']
    assert torch.equal(fit(Short(), CheckpointCB(tmp_path, resume=True), seed=1), whole)

def test_other_callbacks_and_other_fits(tmp_path):
    fit(CheckpointCB(tmp_path))
    with pytest.raises(ValueError, match='checkpoints of another fit'): fit(CheckpointCB(tmp_path))
    with pytest.raises(ValueError, match=r"callbacks: \['BatchSchedCB', 'EMACB'\] in the checkpoint, .*'EMACB-2'"):
        fit(EMACB(), CheckpointCB(tmp_path, resume=True))

def small(bs=8, n=40, shuffle=True):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return DataLoaders(TensorLoader(x, x[:,:1], bs=bs, shuffle=shuffle), [])

def cosine(n): return BatchSchedCB(partial(lr_scheduler.CosineAnnealingLR, T_max=n))
def one_cycle(n): return BatchSchedCB(partial(lr_scheduler.OneCycleLR, max_lr=.1, total_steps=n))
def steps(n): return BatchSchedCB(partial(lr_scheduler.StepLR, step_size=n))
OTHERS = {
    'batch size: 8 in the checkpoint, 10 here': dict(data=dict(bs=10)),
    'batches an epoch: 5 in the checkpoint, 4 here': dict(data=dict(bs=10)),
    'items: 40 in the checkpoint, 39 here': dict(data=dict(n=39)),
    'shuffled: True in the checkpoint, False here': dict(data=dict(shuffle=False)),
    'optimizer: Adam in the checkpoint, AdamW here': dict(opt_func=optim.AdamW),
    'lr: 0.01 in the checkpoint, 0.02 here': dict(lr=.02),
    'betas: ': dict(opt_func=partial(optim.Adam, betas=(.8, .9))),
    'T_max of BatchSchedCB: 10 in the checkpoint, 20 here': dict(cbs=[cosine(20)]),
    'kind of BatchSchedCB: CosineAnnealingLR in the checkpoint, StepLR here': dict(cbs=[steps(3)]),
    "callbacks: \\['BatchSchedCB'\\] in the checkpoint, \\[\\] here": dict(cbs=[]),
    "callbacks: .* in the checkpoint, \\['BatchSchedCB', 'EMACB'\\] here": dict(cbs=[cosine(10), EMACB()]),
}

def fit_small(folder, n=2, data=None, cbs=None, lr=.01, opt_func=optim.Adam, extra=()):
    torch.manual_seed(0)
    cbs = [cosine(10)] if cbs is None else cbs
    model = nn.Linear(4, 1)
    cbs = [TrainCB(), *cbs, CheckpointCB(folder, resume=True), *extra]
    Learner(model, small(**(data or {})), F.mse_loss, lr, cbs, opt_func).fit(n, valid=False)
    return model.weight

@pytest.mark.parametrize('match', OTHERS)
def test_a_resumed_fit_is_the_same_fit(tmp_path, match):
    fit_small(tmp_path)
    with pytest.raises(ValueError, match=match) as e: fit_small(tmp_path, **OTHERS[match])
    assert 'goes on with the same fit' in str(e.value) and 'epochs' not in str(e.value).replace('batches an epoch', '')

@pytest.mark.parametrize('sched', [cosine, one_cycle])
def test_more_epochs_than_the_schedule_was_made_for(tmp_path, sched):
    fit_small(tmp_path, 2, cbs=[sched(10)])
    with pytest.raises(ValueError, match=r'epochs: 2 in the checkpoint, 4 here\n.*10 in the checkpoint, 20 here'):
        fit_small(tmp_path, 4, cbs=[sched(20)])

def test_more_epochs_where_the_schedule_has_no_end(tmp_path):
    whole = fit_small(tmp_path/'whole', 4, cbs=[steps(3)])
    fit_small(tmp_path/'cut', 2, cbs=[steps(3)])
    assert torch.equal(fit_small(tmp_path/'cut', 4, cbs=[steps(3)]), whole)

def test_fewer_epochs_than_were_done(tmp_path, capsys):
    whole = fit_small(tmp_path, 4, cbs=[])
    assert torch.equal(fit_small(tmp_path, 2, cbs=[]), whole)
    assert 'nothing is left to train' in capsys.readouterr().out

def test_another_version_is_a_warning(tmp_path, monkeypatch):
    import importlib.metadata
    fit_small(tmp_path)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, 'version', lambda nm: '99.0' if nm == 'torch' else real(nm))
    with pytest.warns(UserWarning, match=r"of other versions .torch: .* in the checkpoint, 99.0 here"): fit_small(tmp_path)

def test_state_goes_by_kind_not_by_position(tmp_path):
    def fit_(*cbs, **kw): return fit_small(tmp_path/'c', cbs=cbs, **kw)
    a,b = EMACB(.5),EMACB(.9)
    whole = fit_(cosine(10), a, b)
    c,d = EMACB(.5),EMACB(.9)
    assert torch.equal(fit_(MetricsCB(), c, RecorderCB(lr=lambda o: o.pg['lr']), d, cosine(10)), whole)
    for was,now in ((a, c), (b, d)):
        state,other = was.state_dict()['weights'],now.state_dict()['weights']
        assert all(torch.equal(other[k], o) for k,o in state.items())

def test_one_line_says_what_goes_on(tmp_path, capsys):
    fit(CheckpointCB(tmp_path, every=3), PowerCut(10))
    assert capsys.readouterr().out == ''
    fit(Epochs(), CheckpointCB(tmp_path, resume=True))
    assert capsys.readouterr().out == (f'{tmp_path}/step-000000009 is from after batch 2 of 7 in epoch 1, and the fit goes on from there. '
        'Restored: model, optimizer, random numbers, BatchSchedCB, EMACB. Beginning anew: Epochs\n')
    fit(CheckpointCB(tmp_path, resume=True))
    assert 'after epoch 2, and nothing is left to train' in capsys.readouterr().out

def test_the_metrics_of_the_cut_epoch_go_on(tmp_path):
    class Log(MetricsCB):
        def _log(self, d): rows.append(d)
    rows = []
    fit(Log())
    whole,rows = rows,[]
    fit(Log(), CheckpointCB(tmp_path, every=1), PowerCut(10))
    fit(Log(), CheckpointCB(tmp_path, every=1, resume=True), seed=1)
    assert rows == whole

def test_what_the_optimizer_uses_is_what_is_recorded(tmp_path):
    def rates():
        class Rates(Callback):
            def after_batch(self, learn): lrs.append(learn.opt.param_groups[0]['lr'])
        lrs = []
        return lrs,Rates()
    lrs,cb = rates()
    fit_small(tmp_path/'whole', extra=[cb])
    cut,cb = rates()
    with pytest.raises(KeyboardInterrupt): fit_small(tmp_path/'cut', extra=[cb, PowerCut(7)])
    rest,cb = rates()
    fit_small(tmp_path/'cut', extra=[cb])
    assert cut[:5]+rest == lrs

def test_gradients_and_shared_weights(tmp_path):
    "Weights that are tied, in half, and in another order in memory"
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(4, 4),nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.conv = nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last)
            self.register_buffer('low', torch.ones(3, dtype=torch.bfloat16))
        def forward(self, x): return self.b(self.a(x))[:,:1]
    def fit_(*cbs):
        torch.manual_seed(0)
        learn = Learner(Tied(), small(), F.mse_loss, .01, [TrainCB(), *cbs])
        try: learn.fit(2, valid=False)
        except KeyboardInterrupt: pass
        return learn.model.a.weight
    whole = fit_()
    fit_(CheckpointCB(tmp_path, every=2), PowerCut(7))
    assert torch.equal(fit_(CheckpointCB(tmp_path, resume=True)), whole)

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
    assert [int(nm[5:]) for nm in names(tmp_path)] == [3, 6, 7, 10, 13]
    assert torch.equal(fit(GradAccumCB(3), CheckpointCB(tmp_path, resume=True), seed=1), whole)

def test_a_checkpoint_of_another_model_says_what_differs(dls, model, tmp_path):
    def fit_(model): Learner(model, dls, cbs=[TrainCB(), CheckpointCB(tmp_path, resume=True)]).fit(1, valid=False)
    fit_(model)
    with pytest.raises(ValueError, match='of another fit') as e: fit_(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]))
    _,*lines,more,_ = str(e.value).splitlines()
    lost = [f'weight {k}: {shape} torch.float32 in the checkpoint, nothing here' for k,shape in dict(weight=(1, 4), bias=(1,)).items()]
    shapes = {f'{i}.{k}': shape for i in range(3) for k,shape in dict(weight=(4, 4), bias=(4,)).items()}
    assert lines == lost + [f'weight {k}: nothing in the checkpoint, {shape} torch.float32 here' for k,shape in shapes.items()]
    assert more == 'and 2 more'

def test_checkpoints_of_a_compiled_model_are_the_models(dls, model, tmp_path):
    def fit_(model): Learner(model, dls, cbs=[TrainCB(), CheckpointCB(tmp_path, resume=True)]).fit(1, valid=False)
    fit_(torch.compile(model, backend='eager'))
    fit_(other := nn.Linear(4, 1)) # nothing is left to do
    assert torch.equal(other.weight, model.weight)

TOGETHER = """
import sys, torch, torch.nn.functional as F
from pathlib import Path
from accelerate import notebook_launcher
from torch import nn
from miniai.activations import set_seed
from miniai.accel import AccelerateCB
from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders, TensorLoader
from miniai.learner import Callback, Learner, MetricsCB

class Stop(Callback):
    order = 200
    def __init__(self, after): self.after = after
    def after_batch(self, learn):
        self.after -= learn.training
        if not self.after: raise KeyboardInterrupt

class Log(MetricsCB):
    rows = ()
    def _log(self, d): self.rows += (tuple(d.values()),)

def fit(folder, *cbs, seed=0):
    set_seed(1)
    x,model = torch.randn(100, 20),nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Dropout(.5), nn.Linear(16, 3))
    dls = DataLoaders(TensorLoader(x, x[:,:3].argmax(1), bs=17, shuffle=True), TensorLoader(x, x[:,:3].argmax(1), bs=35))
    set_seed(seed)
    cbs = [AccelerateCB(mixed_precision='no'), log := Log(), CheckpointCB(folder, every=2, resume=True), *cbs]
    learn = Learner(model, dls, F.cross_entropy, .1, cbs)
    try: learn.fit(3)
    except KeyboardInterrupt: pass
    return torch.cat([p.detach().flatten() for p in model.parameters()]),log.rows

def run():
    folder = Path(sys.argv[1])
    whole,rows = fit(folder/'whole')
    cut,first = fit(folder/'cut', Stop(9))
    resumed,rest = fit(folder/'cut', seed=7)
    assert not torch.equal(cut, whole) and torch.equal(resumed, whole), 'another end'
    assert first+rest == rows, (first, rest, rows)
    file = folder/'file'
    torch.distributed.barrier()
    try: fit(file)
    except OSError as e: assert 'no checkpoint can be written' in str(e)
    else: raise AssertionError('a file serves as a folder')
    (folder/f'done{torch.distributed.get_rank()}').write_text('yes')

Path(sys.argv[1]).joinpath('file').write_text('x')
notebook_launcher(run, num_processes=2)
"""

def test_two_processes_go_on_with_their_own_random_numbers(tmp_path):
    (script := tmp_path/'fit.py').write_text(TOGETHER)
    res = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True,
                         env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'})
    assert res.returncode == 0, res.stderr[-3000:]
    assert len(list(tmp_path.glob('done*'))) == 2
    assert res.stdout.count('the fit goes on from there') == 1, 'one line, of the main process'

def test_a_fit_that_was_completed_is_compared_too(tmp_path):
    "A notebook whose fit was run twice, and then changed: nothing is passed over in silence"
    def run(twice, n=2, lr=.01, loss=F.mse_loss, decay=.9):
        x = torch.randn(16, 4)
        dls = DataLoaders(TensorLoader(x, x.sum(1, keepdim=True), bs=8), [])
        learn = Learner(net(), dls, loss, lr, [TrainCB(), EMACB(decay), CheckpointCB(tmp_path, resume=True)], optim.AdamW)
        for _ in range(1+twice): learn.fit(n, valid=False)
    run(True)
    run(False) # the first of the two, again
    for change,what in ((dict(n=5), 'epochs: 2'), (dict(lr=.1), 'lr: 0.01'), (dict(decay=.5), 'decay of EMACB: 0.9')):
        with pytest.raises(ValueError, match=what): run(False, **change)
    with pytest.warns(UserWarning, match='another loss'): run(False, loss=F.l1_loss)

def test_who_holds_a_parameter_group_holds_that_of_the_optimizer(tmp_path):
    "As the lesson's recorder does, and a schedule by hand"
    class Own(Callback):
        def before_fit(self, learn): self.pg,self.lrs = learn.opt.param_groups[0],[]
        def before_batch(self, learn):
            if learn.training: self.lrs.append(self.pg['lr']); assert self.pg is learn.opt.param_groups[0]
    whole = fit(own := Own())
    fit(CheckpointCB(tmp_path, every=1), Own(), PowerCut(5))
    assert torch.equal(fit(CheckpointCB(tmp_path, resume=True), again := Own()), whole) and again.lrs == own.lrs[5:]

def test_a_note_in_a_checkpoint_does_no_harm(tmp_path):
    whole = fit()
    fit(CheckpointCB(tmp_path, every=2), PowerCut(6))
    (max(tmp_path.glob('step-*'))/'notes.txt').write_text('this one looks good')
    assert torch.equal(fit(CheckpointCB(tmp_path, resume=True)), whole)

def test_a_generator_of_a_transform_goes_on(tmp_path):
    def noisy():
        gen = torch.Generator().manual_seed(1)
        return BatchTransformCB(lambda b: (b[0] + torch.rand(b[0].shape, generator=gen), b[1]))
    whole = fit(noisy())
    fit(noisy(), CheckpointCB(tmp_path, every=1), PowerCut(5))
    assert torch.equal(fit(noisy(), CheckpointCB(tmp_path, resume=True)), whole)

def test_callbacks_that_only_watch_may_come_and_go(tmp_path):
    from miniai.activations import ActivationStats
    whole = fit()
    fit(CheckpointCB(tmp_path, every=1), ActivationStats(), PowerCut(5))
    assert torch.equal(fit(CheckpointCB(tmp_path, resume=True)), whole)
