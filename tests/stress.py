"""Break fits on purpose, by the hundred, and count what comes through: kills, interrupts, a full disk, two fits on one folder, leaks.

    make stress                                     # all of it, ten minutes on two cores
    python tests/stress.py --few                    # five of each, as in `make test`
    python tests/stress.py --only interrupts        # only the rows that have this in their name
    python tests/stress.py --seed 3                 # at other moments

A fit that was killed is begun again in a new process, and has to end as one that nobody disturbed: the same weights, averages, state of the
optimizer and random numbers, to the last bit. Importing torch takes seconds, so every fit runs in a fork of a process that has done so.
The table has one row for each kind of trouble; below it stands what went wrong. The exit status is 0 if everything is clean.
"""
import argparse, contextlib, gc, hashlib, json, os, random, resource, select, shutil, signal, sys, tempfile
import threading, time, traceback, warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE='1', MPLBACKEND='agg', ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1')
import accelerate # noqa: F401 once, before the forks
import fastprogress.fastprogress, matplotlib.pyplot as plt, IPython.display, numpy as np, torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import miniai.augment
from miniai.accel import AccelerateCB, GradAccumCB, MixedPrecision
from miniai.activations import ActivationStats, HooksCallback, set_seed
from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders, TensorLoader
from miniai.ema import EMACB
from miniai.learner import Callback, DeviceCB, Learner, MetricsCB, ProgressCB, TrainCB, is_main
from miniai.sgd import BatchSchedCB, EpochSchedCB, RecorderCB

torch.set_num_threads(1)
PACKAGE = str(Path(miniai.augment.__file__).parent)+os.sep
LIMIT = 60 # seconds for one fit, which takes less than one: what takes longer hangs
NEVER = 10**9

# Processes

class Child:
    "`f(*args, **kw)` in a process and a group of its own; `told` is what it says on its way with `tell`, and as `end` what it returned"
    def __init__(self, f, *args, limit=LIMIT, **kw):
        self.told,self._text,self.limit = {},b'',limit
        self.pipe,out = os.pipe()
        self.pid = os.fork()
        if not self.pid: _live(out, limit, f, *args, **kw)
        os.close(out)
        with contextlib.suppress(OSError): os.setpgid(self.pid, self.pid)

    def hear(self, key=None):
        "Listen until it has told `key`, or has ended"
        while key not in self.told and 'end' not in self.told and 'error' not in self.told:
            if not select.select([self.pipe], [], [], self.limit)[0]:
                self.told['error'] = f'it hung for {self.limit} seconds'
            elif not (data := os.read(self.pipe, 1<<16)): break
            else:
                *lines,self._text = (self._text+data).split(b'\n')
                for line in lines: self.told |= json.loads(line)
        return self

    def kill(self, workers=True):
        with contextlib.suppress(ProcessLookupError): (os.killpg if workers else os.kill)(self.pid, signal.SIGKILL)

    def end(self, workers=True):
        "What it told, when it is over; and its `workers`"
        self.hear().kill(workers)
        os.waitpid(self.pid, 0)
        os.close(self.pipe)
        return self.told

_out = None # where to tell it

def _be_silent():
    "A fork, such as a worker of a loader, does not keep the pipe of its parent open"
    global _out
    if _out is not None: os.close(_out)
    _out = None
os.register_at_fork(after_in_child=_be_silent)

def tell(**note): os.write(_out, json.dumps(note).encode()+b'\n')

def _live(out, limit, f, *args, **kw):
    global _out
    _out = out
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(limit)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for fd in (1, 2): os.dup2(nowhere, fd)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            res = f(*args, **kw)
        tell(said=[m for w in said if 'mixed precision is meant' not in (m := str(w.message)) and 'damaged' in m], end=res)
    except BaseException as e:
        tell(error=f'{type(e).__name__}: {e}'[:2000], os_error=isinstance(e, OSError), where=traceback.format_exc()[-1500:])
    finally: os._exit(0)

# A fit

BS,EPOCHS,ITEMS = 8,3,52 # seven batches an epoch, the last of them smaller
TOTAL = EPOCHS*7

def torch_loader(x, y, own=False, **kw):
    return DataLoader(TensorDataset(x, y), BS, shuffle=True, generator=torch.Generator().manual_seed(3) if own else None, **kw)
def tensor_loader(x, y): return TensorLoader(x, y, bs=BS, shuffle=True)
def one_cycle(steps): return BatchSchedCB(partial(optim.lr_scheduler.OneCycleLR, max_lr=.02, total_steps=steps))

MODES = { # how the data come, the engine, and more callbacks
    'TensorLoader': {},
    'DataLoader': dict(loader=torch_loader),
    'a generator of its own': dict(loader=partial(torch_loader, own=True)),
    'accumulation': dict(cbs=lambda: [GradAccumCB(3), one_cycle(TOTAL)]),
    '16 bits': dict(engine=partial(MixedPrecision, dtype=torch.bfloat16)),
    'a schedule by epochs': dict(cbs=lambda: [EpochSchedCB(partial(optim.lr_scheduler.StepLR, step_size=1, gamma=.5))]),
    'a worker': dict(loader=partial(torch_loader, num_workers=1)),
    'persistent workers': dict(loader=partial(torch_loader, num_workers=1, persistent_workers=True)),
    'two processes': dict(engine=partial(AccelerateCB, mixed_precision='no'), ranks=2),
}

class Watch(Callback):
    "Tells where training began, and the batch up to which a checkpoint is finished"
    order = CheckpointCB.order+1
    def __init__(self, every, nap=0): self.every,self.nap,self.due,self.begun = every,nap,False,False
    def before_fit(self, learn): self.n = len(learn.dls.train)
    def before_batch(self, learn):
        if learn.training and not self.begun: tell(start=learn.epoch*self.n+learn.iter)
        self.begun |= learn.training
        time.sleep(self.nap)
    def after_batch(self, learn):
        if not learn.training: return
        at = learn.epoch*self.n+learn.iter+1
        self.due |= at % self.every == 0
        if self.due and learn.stepped: self._tell(at)
    def after_epoch(self, learn):
        if learn.training: self._tell((learn.epoch+1)*self.n)
    def _tell(self, at):
        self.due = False
        tell(saved=at)

def digest(*parts):
    "A fingerprint of tensors and numbers, however nested"
    h = hashlib.sha256()
    def add(o):
        if isinstance(o, torch.Tensor):
            h.update(f'{o.dtype}{tuple(o.shape)}'.encode()+o.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(o, Mapping):
            for k in sorted(o, key=str): add(k); add(o[k])
        elif isinstance(o, (list, tuple)):
            for p in o: add(p)
        else: h.update(repr(o).encode())
    add(parts)
    return h.hexdigest()[:16]

def net(): return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 1))

def data():
    x = torch.randn(ITEMS, 4, generator=torch.Generator().manual_seed(0))
    return x,x.sum(1, keepdim=True)

def state(learn, ema):
    numpy,main = np.random.get_state(),is_main()
    weights = (learn.model if main else nn.ParameterList(learn.model.parameters())).state_dict() # buffers are those of the first process
    averages = ema.state_dict() if main else [*ema.model.parameters()]
    return dict(weights=digest(weights), averages=digest(averages), optimizer=digest(learn.opt.state_dict()),
                random=digest(random.getstate(), numpy[1].tolist(), numpy[2:], torch.get_rng_state()))

def fit(folder=None, mode='TensorLoader', seed=0, every=2, keep=3, nap=0, rank=None, meet=None, more=(), at_line=None):
    "Fit from the beginning, or from the newest checkpoint in `folder`; the state at the end"
    how = dict(loader=tensor_loader, engine=TrainCB, cbs=lambda: [one_cycle(TOTAL)], ranks=1) | MODES[mode]
    if meet:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')
        torch.distributed.init_process_group('gloo', init_method=f'file://{meet}', rank=rank, world_size=2)
    set_seed(seed)
    dls = DataLoaders(how['loader'](*data()), TensorLoader(*data(), bs=32))
    cbs = [how['engine'](), MetricsCB(), *how['cbs'](), ema := EMACB(.9)]
    if folder: cbs += [CheckpointCB(folder, every=every, keep=keep, resume=True), Watch(every, nap)]
    learn = Learner(net(), dls, F.mse_loss, .01, [*cbs, *more], optim.AdamW)
    if at_line: sys.settrace(at_line)
    learn.fit(EPOCHS)
    sys.settrace(None)
    if at_line: tell(lines=at_line.count)
    return state(learn, ema)

class Fit:
    "The one or two processes of a fit"
    def __init__(self, folder=None, mode='TensorLoader', **kw):
        ranks = MODES[mode].get('ranks', 1)
        meet = tempfile.mktemp(dir=folder.parent if folder else None) if ranks == 2 else None
        self.children = [Child(fit, folder, mode, rank=i, meet=meet, **kw) for i in range(ranks)]
    def kill(self, workers=True, pause=0):
        for i,o in enumerate(self.children):
            time.sleep(pause*(i > 0))
            o.kill(workers)
    def end(self, workers=True): return [o.end(workers) for o in self.children]

class AtLine:
    "A trace function that calls `act` at the `n`th line that is run in these modules of miniai"
    def __init__(self, n, act, *modules):
        self.n,self.act,self.count,self.seen = n,act,0,[]
        self.files = tuple(f'{PACKAGE}{m}.py' for m in modules) or (PACKAGE,)
        self.left = {} # calls of each function that are followed
    def __call__(self, frame, event, arg):
        code = frame.f_code
        left = self.left[code] = self.left[code]-1 if code in self.left else 300*code.co_filename.startswith(self.files)
        return self.line if left > 0 else None
    def line(self, frame, event, arg):
        if event != 'line': return self.line
        self.seen.append(f'{Path(frame.f_code.co_filename).stem}:{frame.f_lineno}')
        self.count += 1
        if self.count == self.n: self.act()
        return self.line

def die(): os.kill(os.getpid(), signal.SIGKILL)

def same(tolds, whole):
    "What differs from the fit that nobody disturbed"
    odd = []
    for i,(told,w) in enumerate(zip(tolds, whole)):
        if 'error' in told: odd.append(f'{told["error"]} {told.get("where", "")}')
        elif 'end' not in told: odd.append('it died')
        else: odd += [f'{k} differ' for k in w['end'] if told['end'][k] != w['end'][k]] + told['said']
    return odd

def resumed(folder, whole, saved, **kw):
    "Let a fit go on to its end: what went wrong. `saved` is the batch to which a checkpoint had been finished"
    tolds = Fit(folder, seed=1 if saved else 0, **kw).end() # with other random numbers at hand
    start = min(t.get('start', TOTAL) for t in tolds)
    lost = [f'a finished checkpoint of batch {saved} was lost: it went on from {start}'] if start < saved else []
    return same(tolds, whole)+lost

@contextlib.contextmanager
def folders():
    "A function that makes new folders"
    with tempfile.TemporaryDirectory() as tmp: yield lambda: Path(tempfile.mkdtemp(dir=tmp))/'checkpoints'

# Kinds of trouble: each returns how many were tried, how many of them were clean, a note, and what went wrong

def kills(n, rng, modes):
    "At random: after some time, or at some line of miniai; up to three kills before the fit may go on to its end"
    faults,tried,clean,known,order = [],0,0,{},rng.sample(modes, len(modes))
    with folders() as new:
        lines = Fit(new(), modes[0], at_line=AtLine(NEVER, die)).end()[0]['lines']
        start = time.monotonic()
        Fit(new(), modes[0]).end()
        span = time.monotonic()-start
        while tried < n:
            mode,folder,saved,how,killed = order[0],new(),0,[],0
            order = [*order[1:], mode]
            if mode not in known: known[mode] = Fit(mode=mode).end()
            for _ in range(min(rng.choice([1, 1, 2, 3]), n-tried)):
                at = rng.choice([rng.randint(1, lines), rng.uniform(0, span)])
                run = Fit(folder, mode, seed=min(saved, 1), at_line=AtLine(at, die) if isinstance(at, int) else None)
                if isinstance(at, int): run.children[0].hear() # the other process waits for it
                else: time.sleep(at)
                workers = rng.random() < .7 # or they live on for some seconds
                run.kill(workers, rng.choice([0, .01, .3]))
                how.append(f'line {at}' if isinstance(at, int) else f'{at:.3f} s')
                tolds = run.end(workers)
                saved = max([saved, *(t.get('saved', 0) for t in tolds[:1])])
                killed += not all('end' in t for t in tolds)
                if all('end' in t for t in tolds): break # it was quicker
            odd = resumed(folder, known[mode], saved, mode=mode)
            tried,clean = tried+killed,clean+killed*(not odd)
            if odd: faults.append(f'{mode}, killed at {", ".join(how)}; then: {"; ".join(odd)}')
    return tried,clean,f'{len(known)} modes' if len(modes) > 1 else '',faults

FILES = 'FileIO', 'BufferedWriter', 'BufferedReader', 'BufferedRandom', 'TextIOWrapper'
IDLE = 'fspath', 'getpid', 'text_encoding', 'open_code', 'putenv', 'register_at_fork', 'fileno', 'urandom'

def touches_files(f):
    "Is the built-in function `f` one that asks the file system for something?"
    owner,nm = getattr(f, '__self__', None),getattr(f, '__name__', '')
    if nm in ('serialize_file', 'write_record', 'write_end_of_file'): return True
    return (getattr(owner, '__name__', '') in ('posix', 'io', 'fcntl') or type(owner).__name__ in FILES) and nm not in IDLE

class AtCall(Callback):
    "From the end of batch `after` on, call `act` before the `n`th call to the file system"
    order = CheckpointCB.order-1
    def __init__(self, after, n, act): self.after,self.n,self.act,self.calls = after,n,act,[]
    def after_batch(self, learn):
        self.after -= learn.training
        if not self.after: sys.setprofile(self.profile)
    def profile(self, frame, event, arg):
        if event != 'c_call' or not touches_files(arg): return
        if len(self.calls) == self.n: self.act()
        self.calls.append(arg.__name__)
    def cleanup_fit(self, learn): sys.setprofile(None); tell(calls=self.calls)

def file_kills(n, rng):
    "At every call to the file system from the last batch of an epoch, whose checkpoint is written twice, to the end; only one is kept"
    faults,clean,kw = [],0,dict(every=7, keep=1)
    with folders() as new:
        whole = Fit().end()
        calls = Fit(new(), more=[AtCall(14, NEVER, die)], **kw).end()[0]['calls']
        which = range(len(calls)) if n is None else sorted(rng.sample(range(len(calls)), n))
        for i in which:
            told = Fit(folder := new(), more=[AtCall(14, i, die)], **kw).end()[0]
            odd = resumed(folder, whole, told.get('saved', 0), **kw)
            if 'end' in told: odd.append('it was not killed')
            clean += not odd
            if odd: faults.append(f'killed before call {i} of {len(calls)}, {calls[i]}, after batch {told.get("saved")}: {"; ".join(odd)}')
    return len(which),clean,f'{len(calls)} calls',faults

# Interrupts: by a real SIGINT at a line, by an exception in an event

EVENTS = [f'{a}_{b}' for a in ('before', 'after', 'cleanup') for b in ('fit', 'epoch', 'batch')]
EVENTS += ['after_predict', 'after_loss', 'after_backward', 'after_step']
ENGINES = dict(TrainCB=TrainCB, MixedPrecision=partial(MixedPrecision, dtype=torch.bfloat16),
               AccelerateCB=partial(AccelerateCB, mixed_precision='no'))

def ctrl_c(): signal.raise_signal(signal.SIGINT)

class AtEvent(Callback):
    "KeyboardInterrupt at the `n`th `event`; before, among or after the other callbacks"
    def __init__(self, event, n, order):
        self.n,self.order = n,order
        setattr(self, event, self._count)
    def _count(self, learn):
        self.n -= 1
        if not self.n: raise KeyboardInterrupt

def flat(params): return torch.cat([p.detach().flatten() for p in params])

class History:
    "The weights after each step, and the averages as they should be"
    def __init__(self, model): self.weights = [flat(model.parameters())]
    def optimizer(self, params, lr):
        opt = optim.AdamW(params := list(params), lr)
        opt.register_step_post_hook(lambda *_: self.weights.append(flat(params)))
        return opt
    def averages(self):
        res = [self.weights[0]]
        for i,w in enumerate(self.weights[1:], 1): res.append(res[-1].lerp(w, 1-min(.9, (1+i)/(10+i))))
        return res

def interrupted(folder, engine, how, *args):
    "Interrupt a fit, look at what is left, fit again with the same learner; the list of what is wrong"
    set_seed(0)
    model = net()
    dls,seen = DataLoaders(tensor_loader(*data()), TensorLoader(*data(), bs=32)),History(model)
    cbs = [ENGINES[engine](), DeviceCB('cpu'), MetricsCB(), ProgressCB(), one_cycle(14), ema := EMACB(.9)]
    cbs.append(CheckpointCB(folder, every=2, resume=True))
    learn = Learner(model, dls, F.mse_loss, .05, cbs, seen.optimizer)
    trace,extra = None,[HooksCallback(lambda *_: None)]
    if how == 'event': extra.append(AtEvent(*args))
    else: trace = AtLine(args[0], ctrl_c, *args[1:])
    cut = False
    sys.settrace(trace)
    try: learn.fit(2, cbs=extra)
    except KeyboardInterrupt: cut = True
    sys.settrace(None)
    tell(cut=cut, reached=trace is None or trace.count >= trace.n)
    if how == 'lines': tell(seen=trace.seen)
    if not cut: tell(first=state(learn, ema))
    odd = left_over(learn, model, dls, cbs, ema, seen)
    kept = any(o.name.startswith('step-') for o in folder.iterdir()) if folder.exists() else False
    try: learn.fit(2)
    except BaseException: odd.append(f'it cannot fit again: {traceback.format_exc()[-1500:]}')
    else:
        if kept: tell(again=state(learn, ema))
    return odd

def left_over(learn, model, dls, cbs, ema, seen):
    "What an interrupted fit has left behind that it should not have"
    odd = []
    if learn.model is not model: odd.append('learn.model is not the model')
    if not any(torch.equal(flat(model.parameters()), w) for w in seen.weights): odd.append('the weights are none that were ever reached')
    with contextlib.suppress(ValueError): # there may be none yet
        avg = flat(ema.model.parameters())
        if not any(torch.allclose(avg, a, atol=1e-6) for a in seen.averages()): odd.append('the averages are none that were ever reached')
    if learn.cbs != cbs: odd.append(f'cbs are {[type(o).__name__ for o in learn.cbs]}')
    if learn.dls is not dls: odd.append('learn.dls is another')
    if hooks(model): odd.append(f'{hooks(model)} hooks are left')
    if not torch.is_grad_enabled(): odd.append('gradients are off')
    if torch.is_autocast_enabled('cpu'): odd.append('autocast is on')
    if vars(learn.cbs[2]).get('_log'): odd.append('MetricsCB still writes into the bar')
    return odd

def hooks(model): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in model.modules())

def interrupts(n, rng, how, *modules):
    faults,tried,clean,whole = [],0,0,{}
    with folders() as new:
        for engine in ENGINES if n is None else [rng.choice([*ENGINES])]:
            whole[engine] = told = Child(interrupted, new(), engine, 'lines', NEVER, *modules).end()
            if 'error' in told: return 1,0,'',[f'{engine}: {told["error"]} {told.get("where")}']
        todo = events(whole) if how == 'event' else lines(whole, rng, modules)
        for engine,*args in todo if n is None else rng.sample(todo, len(todo)):
            if tried == n: break
            told,w = Child(interrupted, new(), engine, how, *args).end(),whole[engine]
            if not told.get('reached', True): continue # the bar was drawn less often, and so there were fewer lines
            if 'error' in told: odd = [f'{told["error"]} {told.get("where")}']
            elif not told.get('cut'): odd = ['it was not interrupted']
            else:
                # the next fit completes this one, or trains anew if this one was complete already
                ends = [[f'then {k} differ' for k,v in told.get('again', {}).items() if v != w[end][k]] for end in ('first', 'again')]
                odd = told['end'] + min(ends, key=len)
            tried,clean = tried+1,clean+(not odd)
            where = args if how == 'event' else f'{w["seen"][args[0]-1]} (line {args[0]} that is run)'
            if odd: faults.append(f'{engine}, {where}: {"; ".join(odd)}')
    return tried,clean,'',faults

def events(engines):
    "Every event with every engine, at its first and second occasion, before, among and after the other callbacks"
    return [(engine, e, i, order) for engine in engines for e in EVENTS for i in (1, 2) for order in (-1, 50, 200)
            if i == 1 or not e.endswith('fit')]

def lines(whole, rng, modules):
    "Every line, with one of the engines that run it: when it is run first, last, and once in between"
    at = {}
    for engine,told in whole.items():
        for i,line in enumerate(told['seen'], 1): at.setdefault(line, {}).setdefault(engine, []).append(i)
    res = []
    for by_engine in at.values():
        engine,o = rng.choice([*by_engine.items()])
        res += [(engine, i, *modules) for i in sorted({o[0], o[-1], rng.choice(o)})]
    return res

# A full disk, one folder, leaks

class Fill(Callback):
    "From the training batch number `at` on no file can be longer than `limit` bytes; 0: from the beginning"
    order = -1
    def __init__(self, at, limit): self.at,self.limit = at,limit
    def before_fit(self, learn): self._fill(self.at == 0)
    def before_batch(self, learn):
        self.at -= learn.training
        self._fill(learn.training and self.at == 0)
    def _fill(self, now):
        if now: resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))

def full_disk(n, rng):
    "A limit on the size of files: the error names the folder, older checkpoints stay, nothing unfinished does, and a fit goes on later"
    faults,clean = [],0
    with folders() as new:
        whole = Fit().end()
        Fit(folder := new()).end()
        sizes = sorted({p.stat().st_size for p in folder.rglob('*') if p.is_file() and p.parent != folder})
        for _ in range(n):
            at,limit = rng.choice([0, *range(1, TOTAL)]),rng.choice([0, 1, *(s-1 for s in sizes), rng.randrange(sizes[-1])])
            told = Fit(folder := new(), more=[Fill(at, limit)]).end()[0]
            odd = []
            if 'error' not in told: odd.append('there was no error')
            elif not told['os_error']: odd.append(f'not an OSError, but {told["error"]}')
            elif str(folder) not in told['error']: odd.append(f'the folder is not named: {told["error"]}')
            left = [p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith('step-')] if folder.exists() else []
            if left: odd.append(f'{left} are left')
            odd += resumed(folder, whole, told.get('saved', 0))
            clean += not odd
            if odd: faults.append(f'batch {at}, files of up to {limit} bytes, saved {told.get("saved")}: {"; ".join(odd)}')
    return n,clean,'',faults

class Second(Callback):
    "In the same process, another learner begins to fit with the same folder"
    def __init__(self, folder): self.folder,self.due = folder,True
    def after_batch(self, learn):
        if not learn.training or not self.due or learn.iter < 3: return
        self.due,states = False,(random.getstate(), np.random.get_state(), torch.get_rng_state())
        try: fit(self.folder, more=[First()])
        except Exception as e: tell(second=str(e))
        random.setstate(states[0]); np.random.set_state(states[1]); torch.set_rng_state(states[2])

class First(Callback):
    "Does not wait long for the folder, and tells of its first batch"
    order = -1
    def before_fit(self, learn):
        for cb in learn.cbs:
            if isinstance(cb, CheckpointCB): cb.patience = .1
    def before_batch(self, learn): tell(batch=True)

def one_folder(n, rng):
    "The second fit is refused before its first batch; the first goes on to its end, or dies, and then the folder is free"
    faults,clean = [],0
    with folders() as new:
        whole = Fit().end()
        for i in range(n):
            how,folder,odd = ('beside it', 'early', 'the first dies', 'one process', 'one fit')[i % 5],new(),[]
            if how == 'one process':
                told = Fit(folder, more=[Second(folder)]).end()
                if str(folder) not in told[0].get('second', ''): odd.append(f'the second said {told[0].get("second")}')
                if told[0].get('batch'): odd.append('the second had a batch')
                odd += same(told, whole)
            elif how == 'one fit':
                told = Fit(folder, more=[CheckpointCB(folder, resume=True), First()]).end()[0]
                if str(folder) not in told.get('error', '') or 'batch' in told: odd.append(f'not refused: {told}')
            else:
                first = Fit(folder, nap=.03)
                first.children[0].hear('start' if how == 'early' else 'saved')
                told = Fit(folder, more=[First()]).end()[0]
                if str(folder) not in told.get('error', ''): odd.append(f'the folder is not named: {told}')
                if told.get('batch'): odd.append('the second had a batch')
                if how == 'the first dies': first.kill()
                told = first.end()
                odd += resumed(folder, whole, told[0].get('saved', 0)) if how == 'the first dies' else same(told, whole)
            clean += not odd
            if odd: faults.append(f'{how}: {"; ".join(odd)}')
    return n,clean,'',faults

def rss(): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/1e6 if os.path.exists('/proc') else 0

def held():
    "What a process holds"
    children = Path(f'/proc/self/task/{os.getpid()}/children')
    return dict(figures=len(plt.get_fignums()), descriptors=len(os.listdir('/dev/fd')), threads=threading.active_count(),
                children=len(children.read_text().split()) if children.exists() else 0)

def more(before):
    "What it holds more than before; the threads of a loader's workers take a moment to end"
    for _ in range(50):
        res = {k: v-before[k] for k,v in held().items()}
        if not any(v > 0 for v in res.values()): break
        time.sleep(.1)
    return res

def many_fits(n, warm=3):
    "So many fits with everything that could hold on to something; what there is more of after each"
    # as in a notebook, where the bar draws figures
    fastprogress.fastprogress.master_bar,res = fastprogress.fastprogress.NBMasterBar,[]
    IPython.display.display = lambda *args, **kw: SimpleNamespace(update=lambda *args: None)
    model,folder = net(),Path(tempfile.mkdtemp())
    dls = DataLoaders(tensor_loader(*data()), torch_loader(*data(), num_workers=1))
    for i in range(-warm, n):
        if i == 0: before,memory = held(),rss()
        cbs = [TrainCB(), DeviceCB('cpu'), MetricsCB(), ProgressCB(plot=True), RecorderCB(lr=lambda o: o.pg['lr']), EMACB()]
        learn = Learner(model, dls, F.mse_loss, .01, [*cbs, ActivationStats(), CheckpointCB(folder/str(i))], optim.AdamW)
        learn.fit(1)
        learn.capture_preds()
        learn.summary()
        gc.collect()
        if i >= 0: res.append(more(before) | dict(hooks=hooks(model)))
        shutil.rmtree(folder/str(i))
    shutil.rmtree(folder)
    return dict(more=res, memory=rss()-memory)

def leaks(n, rng):
    told = Child(many_fits, n).end()
    if 'error' in told: return n,0,'',[told['error']+told.get('where', '')]
    kept,memory = told['end']['more'],told['end']['memory']
    faults = [f'after fit {i}: {o}' for i,o in enumerate(kept) if any(v > 0 for v in o.values())]
    clean = n-len(faults)
    if memory > 20: faults,clean = [*faults, f'{memory:.1f} MB more memory'],0
    note = ', '.join(f'{v} {k}' for k,v in kept[-1].items())
    return n,clean,f'{note}, {memory:.1f} MB more',faults

# The table

ORDINARY = 'TensorLoader', 'DataLoader', 'accumulation', '16 bits', 'a schedule by epochs', 'a worker'
ROWS = { # how much to try, None for all there is, and what
    'kills at random: ordinary modes': (72, partial(kills, modes=ORDINARY)),
    'kills at random: a loader with a generator': (15, partial(kills, modes=['a generator of its own'])),
    'kills at random: persistent workers': (15, partial(kills, modes=['persistent workers'])),
    'kills at random: two processes with dropout': (10, partial(kills, modes=['two processes'])),
    'kills at calls to the file system': (None, file_kills),
    'interrupts at events': (None, partial(interrupts, how='event')),
    'interrupts in the averages': (None, lambda n, rng: interrupts(n, rng, 'lines', 'ema')),
    'interrupts in the loop, engines, checkpoints': (None, lambda n, rng: interrupts(n, rng, 'lines', 'learner', 'accel', 'checkpoint')),
    'a full disk': (40, full_disk),
    'two fits on one folder': (20, one_folder),
    'leaks, in so many fits': (20, leaks),
}

def warm_up():
    "What is imported late, before the forks. No backward: its threads would not live on in a fork"
    model = net().eval()
    model(torch.zeros(2, 4))
    opt = optim.AdamW(model.parameters())
    with tempfile.TemporaryDirectory() as tmp:
        torch.save(opt.state_dict(), f'{tmp}/a')
        torch.load(f'{tmp}/a', weights_only=True)
        save(model.state_dict())
    optim.lr_scheduler.OneCycleLR(opt, .1, total_steps=9)
    gc.collect()
    gc.freeze() # or each fork would copy what it collects

def main(argv=None):
    p = argparse.ArgumentParser()
    p.add_argument('--few', action='store_true', help='five of each')
    p.add_argument('--only', default='', help='rows that have this in their name')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--json', help='write the counts to this file')
    args = p.parse_args(argv)
    warm_up()
    todo = [(nm, 5 if args.few else n, f) for nm,(n,f) in ROWS.items() if args.only in nm]
    running,done,start = {},{},time.monotonic()
    print(f'seed {args.seed}\n{"":48}{"tried":>6}{"clean":>6}')
    while todo or running:
        while todo and len(running) < (os.cpu_count() or 1):
            nm,n,f = todo.pop(0)
            running[nm] = Child(f, n, random.Random(f'{args.seed} {nm}'), limit=3600)
            running[nm].since = time.monotonic()
        ready = select.select([o.pipe for o in running.values()], [], [])[0]
        for nm in [nm for nm,o in running.items() if o.pipe in ready]:
            told = (child := running.pop(nm)).end()
            tried,clean,note,faults = done[nm] = told.get('end') or (1, 0, '', [f'{told.get("error", "it died")} {told.get("where", "")}'])
            note += '' if clean == tried else '  NOT CLEAN'
            print(f'{nm:48}{tried:6}{clean:6}  {time.monotonic()-child.since:3.0f} s  {note}', flush=True)
    total = [sum(r[i] for r in done.values()) for i in (0, 1)]
    print(f'{"in all":48}{total[0]:6}{total[1]:6}  {time.monotonic()-start:3.0f} s')
    for nm,(_,_,_,faults) in done.items():
        for fault in faults[:5]: print(f'\n{nm}: {fault}')
        if len(faults) > 5: print(f'\n{nm}: and {len(faults)-5} more')
    if args.json: Path(args.json).write_text(json.dumps(done))
    return int(total[0] != total[1])

if __name__ == '__main__': sys.exit(main())
