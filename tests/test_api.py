"""The names that notebooks written against the 2022 course import: they are there, with these parameters and defaults.

More parameters may follow, with defaults. `miniai.diffusion` is not built yet, and so not in the table.
"""
import importlib, inspect, pkgutil, subprocess, sys
from functools import reduce

import pytest
import torch.nn.functional as F
from fastcore.basics import noop
from torch import nn, optim

import miniai
from miniai.conv import def_device
from miniai.learner import Learner
from miniai.resnet import act_gr

TABLE = '''
training     accuracy            (out, yb)
training     report              (loss, preds, yb)
training     Dataset             (x, y)
training     fit                 (epochs, model, loss_func, opt, train_dl, valid_dl)
training     get_dls             (train_ds, valid_ds, bs, **kwargs)
datasets     inplace             (f)
datasets     collate_dict        (ds)
datasets     show_image          (im, ax=None, figsize=None, title=None, noframe=True, **kwargs)
datasets     subplots            (nrows=1, ncols=1, figsize=None, imsize=3, suptitle=None, **kwargs)
datasets     get_grid            (n, nrows=None, ncols=None, title=None, weight='bold', size=14, **kwargs)
datasets     show_images         (ims, nrows=None, ncols=None, titles=None, **kwargs)
datasets     DataLoaders         (*dls)
datasets     DataLoaders.from_dd (dd, batch_size, as_tuple=True, **kwargs)
conv         conv                (ni, nf, ks=3, stride=2, act=True)
conv         to_device           (x, device=def_device)
conv         collate_device      (b)
learner      CancelFitException
learner      CancelBatchException
learner      CancelEpochException
learner      Callback            ()
learner      run_cbs             (cbs, method_nm, learn=None)
learner      SingleBatchCB       ()
learner      to_cpu              (x)
learner      MetricsCB           (*ms, **metrics)
learner      DeviceCB            (device=def_device)
learner      TrainCB             (n_inp=1)
learner      ProgressCB          (plot=False)
learner      with_cbs            (nm)
learner      Learner             (model, dls=(0,), loss_func=F.mse_loss, lr=0.1, cbs=None, opt_func=optim.SGD)
learner      Learner.fit         (self, n_epochs=1, train=True, valid=True, cbs=None, lr=None)
learner      Learner.callback    (self, method_nm)
learner      TrainLearner        (model, dls=(0,), loss_func=F.mse_loss, lr=0.1, cbs=None, opt_func=optim.SGD)
learner      MomentumLearner     (model, dls, loss_func, lr=None, cbs=None, opt_func=optim.SGD, mom=0.85)
learner      LRFinderCB          (gamma=1.3, max_mult=3)
learner      Learner.lr_find     (self, gamma=1.3, max_mult=3, start_lr=1e-05, max_epochs=10)
activations  set_seed            (seed, deterministic=False)
activations  Hook                (m, f)
activations  Hooks               (ms, f)
activations  HooksCallback       (hookfunc, mod_filter=noop, on_train=True, on_valid=False, mods=None)
activations  append_stats        (hook, mod, inp, outp)
activations  get_hist            (h)
activations  get_min             (h)
activations  ActivationStats     (mod_filter=noop)
init         clean_ipython_hist  ()
init         clean_tb            ()
init         clean_mem           ()
init         BatchTransformCB    (tfm, on_train=True, on_val=True)
init         GeneralRelu         (leak=None, sub=None, maxv=None)
init         plot_func           (f, start=-5.0, end=5.0, steps=100)
init         init_weights        (m, leaky=0.0)
init         lsuv_init           (model, m, m_in, xb)
init         conv                (ni, nf, ks=3, stride=2, act=nn.ReLU, norm=None, bias=None)
init         get_model           (act=nn.ReLU, nfs=None, norm=None)
init         _lsuv_stats         (hook, mod, inp, outp)
sgd          BaseSchedCB         (sched)
sgd          BatchSchedCB        (sched)
sgd          HasLearnCB          ()
sgd          RecorderCB          (**d)
sgd          EpochSchedCB        (sched)
resnet       act_gr              (leak=0.1, sub=0.4, maxv=None)
resnet       ResBlock            (ni, nf, stride=1, ks=3, act=act_gr, norm=None)
resnet       _conv_block         (ni, nf, stride, act=act_gr, norm=None, ks=3)
augment      CapturePreds        ()
augment      rand_erase          (x, pct=0.2, max_num=4)
augment      RandErase           (pct=0.2, max_num=4)
augment      rand_copy           (x, pct=0.2, max_num=4)
augment      RandCopy            (pct=0.2, max_num=4)
augment      Learner.summary     (self)
augment      Learner.show_image_batch (self, max_n=9, cbs=None, **kwargs)
augment      Learner.capture_preds (self, cbs=None, inps=False)
augment      _flops              (x, h, w)
augment      _rand_erase1        (x, pct, xm, xs, mn, mx)
augment      _rand_copy1         (x, pct)
accel        MixedPrecision      (n_inp=1)
accel        AccelerateCB        (n_inp=1, mixed_precision='fp16')
fid          ImageEval           (model, dls, cbs=None)
fid          _calc_stats         (feats)
fid          _calc_fid           (m1, c1, m2, c2)
fid          _calc_kid           (x, y, maxs=50)
fid          _squared_mmd        (x, y)
fid          _sqrtm_newton_schulz (mat, num_iters=100)
'''
ROWS = [line.split(None, 2) for line in TABLE.strip().splitlines()]
DEFAULTS = dict(F=F, nn=nn, optim=optim, noop=noop, def_device=def_device, act_gr=act_gr) # what the table's defaults are called
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD

def find(module, name):
    "Where the table says; patched methods are those of Learner"
    where = Learner if name.startswith('Learner.') else importlib.import_module(f'miniai.{module}')
    return reduce(getattr, name.removeprefix('Learner.').split('.'), where)

def parameters(signature):
    "Name, kind and default of each parameter; `partial` makes those after the given ones keyword-only, which is as good"
    return [(p.name, POSITIONAL if p.kind == p.KEYWORD_ONLY else p.kind, p.default) for p in signature.parameters.values()]

@pytest.mark.parametrize('row', ROWS, ids=lambda row: '.'.join(row[:2]))
def test_name_and_signature(row):
    module,name,*signature = row
    found = find(module, name)
    if not signature: return
    want = parameters(inspect.signature(eval(f'lambda {signature[0][1:-1]}: 0', DEFAULTS)))
    have = parameters(inspect.signature(found))
    extra = [p for p in have if p not in want]
    assert [p for p in have if p in want] == want
    if not any(kind == inspect.Parameter.VAR_KEYWORD for _,kind,_ in want): assert have[:len(want)] == want
    assert all(default is not inspect.Parameter.empty for _,_,default in extra)

@pytest.mark.parametrize('row', [r for r in ROWS if r[1][0] != '_'], ids=lambda row: '.'.join(row[:2]))
def test_star_import_brings_it(row):
    module,name = row[:2]
    if (module, name) == ('conv', 'conv'): module = 'init' # the later import wins
    assert find('imports', name) == find(module, name)

MODULES = [m.name for m in pkgutil.iter_modules(miniai.__path__) if m.name != 'imports' and not m.name.startswith('_')]
@pytest.mark.parametrize('module', MODULES)
def test_star_import_of_each_module_defines_what_it_names(module):
    "api.md, behaviour 15"
    m = importlib.import_module(f'miniai.{module}')
    assert m.__all__ and all(getattr(m, nm, None) is not None for nm in m.__all__)

def test_imports_need_only_what_settings_ini_installs():
    "Every module imports where the packages for developers are hidden"
    import configparser
    from pathlib import Path
    ini = configparser.ConfigParser()
    ini.read(Path(__file__).parent.parent/'settings.ini')
    dev = [r for k in ('dev_requirements', 'docs_requirements') for r in ini['DEFAULT'][k].split()]
    hidden = [r.split('>')[0].split('[')[0] for r in dev] + ['IPython']
    code = f'''
import sys
for nm in {hidden}: sys.modules[nm] = None
import miniai, pkgutil, importlib
for m in pkgutil.iter_modules(miniai.__path__): importlib.import_module(f'miniai.{{m.name}}')
'''
    subprocess.run([sys.executable, '-c', code], check=True)
