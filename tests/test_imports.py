"The star import of the course's later notebooks"
import importlib, subprocess, sys

import pytest
import miniai.imports
from test_api import TABLE

# of what the course does not have, the star import brings callbacks, and what gets images into a Learner
MORE = {'CancelStepException', 'FuncMetric', 'TensorLoader', 'fashion_mnist', 'get_dls', 'in_memory', 'is_drawn', 'to_dataset', 'to_float',
        'to_tensors'}
ORDER = 'datasets conv learner activations init sgd resnet augment accel fid training'.split()

@pytest.mark.parametrize('i,module', list(enumerate(ORDER)), ids=ORDER)
def test_every_public_name_and_of_two_the_later(i, module):
    def public(module): return (m := importlib.import_module(f'miniai.{module}')),m.__all__
    m,names = public(module)
    later = {nm for o in ORDER[i+1:] for nm in public(o)[1]}
    assert names and [nm for nm in names if nm not in later and getattr(miniai.imports, nm) is not getattr(m, nm)] == []

@pytest.mark.parametrize('module', ORDER)
def test_the_star_import_brings_only_what_the_course_has_and_callbacks(module):
    "Other names, such as Mean, may be a user's own"
    course = {line.split()[1].split('.')[0] for line in TABLE.splitlines() if line.startswith(f'{module} ')}
    names = set(importlib.import_module(f'miniai.{module}').__all__)
    assert {nm for nm in names - course - MORE if not nm.endswith('CB')} <= {'def_device', 'act_gr'}

@pytest.mark.parametrize('name', ['Mean', 'Report', 'budget', 'first_tensor', 'n_items', 'drawn', 'cache_dir', 'Inception', 'mode_kept'])
def test_a_name_of_the_users_own_is_not_overwritten(name):
    names = {name: 'mine'}
    for module in (*ORDER, 'imports'): exec(f'from miniai.{module} import *', names)
    assert names[name] == 'mine'

def test_star_import_in_a_new_process():
    "Names of other libraries keep their meaning; there is no `__all__`; importing changes nothing"
    code = '''
import random, threading
import matplotlib, matplotlib.pyplot, numpy, torch
def state():
    return (random.getstate(), torch.get_rng_state().tolist(), dict(matplotlib.rcParams), threading.active_count(),
            torch.get_num_threads())
before = state()
from miniai.imports import *
assert state() == before
import datasets as ds, fastcore.all, torchvision.transforms as tt, torchvision.transforms.functional as ttf, functools, operator, pathlib
assert (datasets, T, TF, fc, np, mpl, plt) == (ds, tt, ttf, fastcore.all, numpy, matplotlib, matplotlib.pyplot)
assert (F, nn, optim, init, lr_scheduler) == (torch.nn.functional, torch.nn, torch.optim, torch.nn.init, torch.optim.lr_scheduler)
assert (tensor, partial, wraps) == (torch.tensor, functools.partial, functools.wraps)
assert (itemgetter, attrgetter) == (operator.itemgetter, operator.attrgetter)
assert (Path, L, load_dataset) == (pathlib.Path, fc.L, ds.load_dataset)
assert (DataLoader, default_collate) == (torch.utils.data.DataLoader, torch.utils.data.default_collate)
assert callable(read_image) and ImageReadMode.GRAY and math.pi and random.random
import miniai.imports
assert not hasattr(miniai.imports, '__all__')
assert def_device in ('cpu', 'cuda', 'mps', 'xpu')
'''
    subprocess.run([sys.executable, '-c', code], check=True)
