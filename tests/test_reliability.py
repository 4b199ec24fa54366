"What goes wrong is named, leaves nothing behind, and can be tried again"
import ast, contextlib, gzip, hashlib, json, pickle, shutil, signal, subprocess, sys, tracemalloc, zipfile
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from helpers import RaiseCB, Recorder, weights
from torch import nn
from torchmetrics import MeanAbsoluteError

from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders
from miniai.dropout import Classifier, load_classifier, save_classifier
from miniai.fashion import read_idx
from miniai.learner import Callback, DeviceCB, Learner, MetricsCB, ProgressCB, TrainCB, TrainLearner

ROOT = Path(__file__).resolve().parent.parent

def per_item(p, t): return F.mse_loss(p, t, reduction='none')
def interrupt(learn): signal.raise_signal(signal.SIGINT)
class CtrlC(Callback):
    "A real SIGINT in the middle of an epoch, when gradients are there and the step has not been made"
    def after_backward(self, learn):
        if learn.iter == 4: interrupt(learn)

CASES = {
    'no TrainCB': (dict(cbs=[]), None, AttributeError, r"step 'predict': add TrainCB\(\)"),
    'empty loader': (dict(dls=DataLoaders([], [1])), None, ValueError, 'dls.train gave no batch'),
    'empty generator': (dict(dls=DataLoaders(iter(()), [1])), None, ValueError, 'dls.train gave no batch'),
    'no data': (dict(dls=(0,)), None, ValueError, 'has no data'),
    'loss of many numbers': (dict(loss_func=per_item), None, ValueError, r'returned shape \(8, 1\)'),
    'wrong shapes': (dict(model=nn.Linear(3, 1)), None, RuntimeError, 'shapes cannot be multiplied'),
    'a callback that raises': ({}, RaiseCB('after_predict', ZeroDivisionError('mine'), n=4), ZeroDivisionError, 'mine'),
    'an error in before_fit': ({}, RaiseCB('before_fit', OSError('disk')), OSError, 'disk'),
    'Ctrl-C': ({}, CtrlC(), KeyboardInterrupt, None),
}

@pytest.mark.parametrize('case', CASES)
def test_a_fit_that_fails(case, dls):
    change,cb,exc,message = CASES[case]
    torch.manual_seed(1)
    rec,good = Recorder(order=-1),dict(model=nn.Linear(4, 1), dls=dls, loss_func=F.mse_loss)
    learn = Learner(**(good | dict(cbs=[TrainCB(), MetricsCB(), ProgressCB(plot=True)]) | change))
    extra = [rec] + ([cb] if cb else [])
    had = list(learn.cbs)
    with pytest.raises(exc, match=message) as e: learn.fit(2, cbs=extra)
    if cb and exc is not KeyboardInterrupt: assert e.value.__notes__ == ['This was raised in RaiseCB._raise']
    assert learn.cbs == had, 'callbacks given to fit are gone'
    for level in ('fit', 'epoch', 'batch'): assert rec.seen.count(f'before_{level}') == rec.seen.count(f'cleanup_{level}')
    assert case == 'no data' or rec.seen[-1] == 'cleanup_fit'

    for k,v in good.items():
        if k in change: setattr(learn, k, v)
    learn.cbs = [TrainCB(), MetricsCB(), ProgressCB()]
    learn.model.load_state_dict(start := nn.Linear(4, 1).state_dict())
    learn.fit(2)
    fresh = TrainLearner(nn.Linear(4, 1), dls)
    fresh.model.load_state_dict(start)
    fresh.fit(2)
    assert torch.equal(weights(learn.model), weights(fresh.model)), 'nothing of the failed fit may be left'

def test_an_error_in_cleanup_does_not_hide_the_first(model, dls):
    learn = Learner(model, dls, cbs=[TrainCB(), RaiseCB('after_loss', ValueError('first')), RaiseCB('cleanup_fit', OSError('second'))])
    with pytest.raises(OSError) as e: learn.fit(1)
    assert isinstance(e.value.__context__, ValueError)

def test_validation_error_restores_grad_mode(model, dls):
    class Boom(Callback):
        def after_loss(self, learn):
            if not learn.training: raise ValueError
    with pytest.raises(ValueError): TrainLearner(model, dls, cbs=Boom()).fit(1)
    assert torch.is_grad_enabled()

def test_import_brings_no_heavy_library_and_changes_nothing():
    code = '''
import logging, random, sys, threading, warnings
import matplotlib, matplotlib.pyplot, numpy, torch
def state():
    return (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(matplotlib.rcParams),
            logging.getLogger().level, logging.getLogger().handlers[:], threading.active_count(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), warnings.filters[:], matplotlib.pyplot.get_fignums())
before = state()
import miniai.learner, miniai.ddpm, miniai.sgd
print([m for m in ('datasets', 'diffusers', 'torchmetrics', 'fastprogress', 'IPython', 'pandas') if m in sys.modules], state() == before)
'''
    res = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True)
    assert res.stdout.strip() == '[] True', res.stderr

def test_training_leaves_the_seed_alone(model, dls):
    before = torch.get_rng_state()
    TrainLearner(model, dls, cbs=[DeviceCB('cpu'), MetricsCB(), ProgressCB()]).fit(2)
    assert torch.equal(before, torch.get_rng_state())

def test_things_that_are_not_callbacks(model, dls):
    with pytest.raises(TypeError, match=r'write MetricsCB\(\)'): Learner(model, dls, cbs=[TrainCB(), MetricsCB])
    with pytest.raises(TypeError, match=r'write ProgressCB\(\)'): TrainLearner(model, dls).fit(1, cbs=ProgressCB)
    for cbs in (object(), [[TrainCB()]], 'TrainCB', [None]):
        with pytest.raises(TypeError, match='is not a callback'): TrainLearner(model, dls, cbs=cbs)
    learn = TrainLearner(model, dls)
    learn.cbs.append(MetricsCB)
    with pytest.raises(TypeError, match=r'write MetricsCB\(\)'): learn.fit(1)
    with pytest.raises(TypeError, match='MeanAbsoluteError is a class'): MetricsCB(mae=MeanAbsoluteError)

def test_two_callbacks_for_one_step(model, dls):
    learn = Learner(model, dls, cbs=[TrainCB(), TrainCB()])
    with pytest.raises(ValueError, match="both supply the step 'backward'"): learn.fit(1)
    learn.cbs.pop()
    learn.fit(1)

# Broken on purpose: five of each kind of trouble; `make stress` has hundreds

KINDS = ['kills at random: ordinary modes', 'kills at random: a loader with a generator', 'kills at random: persistent workers',
         'kills at random: two processes with dropout', 'kills at calls to the file system', 'interrupts at events',
         'interrupts in the averages', 'interrupts in the loop, engines, checkpoints', 'a full disk', 'two fits on one folder',
         'leaks, in so many fits']

@pytest.fixture(scope='module')
def counts(tmp_path_factory):
    "The table of tests/stress.py, in a process of its own: it forks, which a process with threads should not"
    path = tmp_path_factory.mktemp('stress')/'counts.json'
    res = subprocess.run([sys.executable, str(ROOT/'tests/stress.py'), '--few', '--json', str(path)], text=True, capture_output=True)
    assert path.exists(), res.stdout+res.stderr
    res = json.loads(path.read_text())
    assert sorted(res) == sorted(KINDS)
    return res

@pytest.mark.parametrize('kind', KINDS)
def test_nothing_is_lost(counts, kind):
    tried,clean,_,faults = counts[kind]
    assert faults == [] and clean == tried >= 5

# What .github/SECURITY.md promises of all modules; the tests of each look at its own files

@pytest.mark.parametrize('path', sorted((ROOT/'miniai').glob('*.py')), ids=lambda p: p.stem)
def test_no_file_can_run_code(path):
    "No pickle is loaded, no code comes with a data set"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    imported = {a.name for o in ast.walk(tree) if isinstance(o, ast.Import) for a in o.names}
    imported |= {o.module for o in ast.walk(tree) if isinstance(o, ast.ImportFrom)}
    assert not imported & {'pickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal'}
    for o in ast.walk(tree):
        if not isinstance(o, ast.Call): continue
        said = {k.arg: ast.unparse(k.value) for k in o.keywords}
        assert 'trust_remote_code' not in said and said.get('allow_pickle', 'False') == 'False' and said.get('shell', 'False') == 'False'
        what = ast.unparse(o.func)
        assert what not in ('eval', 'exec', 'os.system')
        if what == 'torch.load' or what.endswith(('.get_state_dict', 'load_state_dict_from_url')): assert said['weights_only'] == 'True'

class Evil:
    "Once it is unpickled, there is a file"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

def checkpoints(folder, dls): Learner(nn.Linear(4, 1), dls, cbs=[TrainCB(), CheckpointCB(folder, resume=True)], lr=.01).fit(2, valid=False)

def newest_is_damaged(folder, dls):
    "Fit, or go on, though the newest checkpoint is not to be trusted; the one before it is taken"
    with pytest.warns(UserWarning, match='is damaged'): checkpoints(folder, dls)

def vouch(path):
    "Write checksums.json anew, as whoever forged the files would"
    files = [p for p in path.iterdir() if p.name != 'checksums.json']
    sums = {p.name: dict(size=p.stat().st_size, sha256=hashlib.sha256(p.read_bytes()).hexdigest()) for p in files}
    (path/'checksums.json').write_text(json.dumps(sums))

@pytest.fixture
def newest(tmp_path, dls):
    "The newest of two checkpoints"
    checkpoints(tmp_path, dls)
    return max(tmp_path.glob('step-*'))

def load_idx(folder, dls): pytest.raises(ValueError, read_idx, folder/'a.idx')
def load_weights(folder, dls): pytest.raises(ValueError, load_classifier, folder)

@pytest.mark.parametrize('name', ['rest.pt', 'model.safetensors'])
@pytest.mark.parametrize('save', [torch.save, lambda o,path: path.write_bytes(pickle.dumps(o))], ids=['torch', 'pickle'])
def test_a_forged_checkpoint_runs_nothing(tmp_path, newest, dls, name, save):
    save(dict(a=Evil(tmp_path/'ran')), newest/name)
    vouch(newest)
    newest_is_damaged(tmp_path, dls)
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('load,name', [(load_weights, 'model.safetensors'), (load_weights, 'config.json'), (load_idx, 'a.idx')])
@pytest.mark.parametrize('save', [torch.save, lambda o,path: path.write_bytes(pickle.dumps(o))], ids=['torch', 'pickle'])
def test_other_forged_files_run_nothing(tmp_path, load, name, save):
    save_classifier(Classifier((4, 4)), tmp_path)
    save(dict(a=Evil(tmp_path/'ran')), tmp_path/name)
    load(tmp_path, None)
    assert not (tmp_path/'ran').exists()

@contextlib.contextmanager
def little_memory(mb=30):
    "Inside, Python takes no more than that"
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mb*1e6
    finally: tracemalloc.stop()

def blow_up(path, n=4*10**8):
    "A file that says that it has so many bytes, all of them zero"
    with open(path, 'r+b') as f: f.truncate(n)

@pytest.mark.parametrize('name', ['rest.pt', 'model.safetensors', 'checksums.json'])
def test_a_checkpoint_that_is_too_large_is_not_read(tmp_path, newest, dls, name):
    blow_up(newest/name)
    with little_memory(): newest_is_damaged(tmp_path, dls)

def test_a_checkpoint_that_grows_when_it_is_unpacked(tmp_path, newest, dls):
    with zipfile.ZipFile(newest/'rest.pt', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('rest/data.pkl', bytes(10**8))
    vouch(newest)
    with little_memory(): newest_is_damaged(tmp_path, dls)

def test_a_header_that_promises_too_much(tmp_path, newest, dls):
    "Safetensors whose header says that it is as long as the memory, and weights of a size that is not in the file"
    weight = b'{"weight":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,39999999996]}}'
    for header in (b'\xff'*7+b'\x0f{}', len(weight).to_bytes(8, 'little')+weight):
        (newest/'model.safetensors').write_bytes(header)
        vouch(newest)
        with little_memory(): newest_is_damaged(tmp_path, dls)
        newest = max(tmp_path.glob('step-*'))

@pytest.mark.parametrize('config', [dict(nfs=[10**9, 10**9]), dict(nfs=[8]*10**5), dict(nfs=[8, -8])])
def test_weights_are_measured_before_there_is_a_model(tmp_path, config):
    save_classifier(Classifier((4, 4)), tmp_path)
    (tmp_path/'config.json').write_text(json.dumps(config))
    with little_memory(): load_weights(tmp_path, None)

@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
def test_weights_that_are_too_large_are_not_read(tmp_path, name):
    save_classifier(Classifier((4, 4)), tmp_path)
    blow_up(tmp_path/name)
    with little_memory(): load_weights(tmp_path, None)

def idx(*shape): return b'\0\0\x08'+bytes([len(shape)])+b''.join(n.to_bytes(4, 'big', signed=True) for n in shape)

HEADS = dict(small=idx(10, 10), huge=idx(2**30, 2**30), negative=idx(-1, -1), many=idx(*[1]*255), none=b'')

@pytest.mark.parametrize('head', HEADS.values(), ids=HEADS)
@pytest.mark.parametrize('zipped', [True, False])
def test_images_are_measured_before_they_are_unpacked(tmp_path, head, zipped):
    if zipped: (tmp_path/'a.idx').write_bytes(gzip.compress(head+bytes(10**8), 1))
    else:
        (tmp_path/'a.idx').write_bytes(head)
        blow_up(tmp_path/'a.idx')
    with little_memory(): load_idx(tmp_path, None)

@pytest.mark.parametrize('name', ['../secret', '/etc/hostname', 'sub/secret', '..', ''])
def test_a_list_of_files_names_only_those_of_its_folder(tmp_path, newest, dls, name):
    (tmp_path/'secret').write_text('secret')
    sums = json.loads((newest/'checksums.json').read_text())
    (newest/'checksums.json').write_text(json.dumps(sums | {name: dict(size=6, sha256=hashlib.sha256(b'secret').hexdigest())}))
    newest_is_damaged(tmp_path, dls)
    assert (tmp_path/'secret').read_text() == 'secret'

@pytest.mark.parametrize('name', ['rest.pt', 'model.safetensors', 'checksums.json'])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, newest, dls, name):
    (newest/name).rename(tmp_path/'elsewhere')
    (newest/name).symlink_to(tmp_path/'elsewhere')
    newest_is_damaged(tmp_path, dls)

NOTHING = ['', '{}', '[]', 'null', '0', '{"rest.pt": {}}', '{"rest.pt": null, "model.safetensors": null}', '\0', '['*10**5]

@pytest.mark.parametrize('text', NOTHING, ids=[o[:20] or 'empty' for o in NOTHING])
def test_a_check_cannot_be_switched_off(tmp_path, newest, dls, text):
    (newest/'model.safetensors').write_bytes((newest/'model.safetensors').read_bytes()[:-1]+b'\1')
    (newest/'checksums.json').write_text(text)
    newest_is_damaged(tmp_path, dls)

def test_a_file_that_no_checksum_names(tmp_path, newest, dls):
    shutil.copy(newest/'model.safetensors', newest/'EMACB.safetensors')
    newest_is_damaged(tmp_path, dls)
