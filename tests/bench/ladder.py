"""From the lesson's first DDPM to the fast one, a lever a rung: what each buys, alone and on top of those before it.

    python tests/bench/ladder.py                                    # more than an hour on two cores; a second call goes on
    python tests/bench/ladder.py --full 'Adam eps 1e-5, lr 5e-3'    # five epochs with all levers up to this one
    python tests/bench/ladder.py --full '12 DDPM' --epochs 2        # the recipe of the notebook 12

Every recipe trains for the same time, with a OneCycle schedule of as many steps as fit into it. It is judged by the mean
squared error of the noise that it predicts in 512 test images, at the noise levels of the linear schedule, whatever its
own schedule and target are; padding does not count. The sums are judged by FID and KID of 2,048 samples (DDIM, 25 steps),
too (notebook 15). One run each, with the same seed, and two sums with other seeds, to see what is chance. Results:
tests/bench/ladder.json, which the notebook 92 draws; weights and samples: _run/ladder.
"""
import argparse, json, statistics, time
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np, torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import optim

from machine import machine
from miniai.accel import GradClipCB, MixedPrecision
from miniai.activations import set_seed
from miniai.checkpoint import CheckpointCB
from miniai.conv import def_device
from miniai.datasets import DataLoaders, fashion_mnist, in_memory, inplace, to_float
from miniai.ddpm import SpaceToDepth, to_grid
from miniai.dropout import trained_classifier
from miniai.ema import EMACB
from miniai.fast_ddpm import DDPMCB, UNet, NoiseFromV, VPredCB, init_ddpm, min_snr
from miniai.fid import ImageEval
from miniai.learner import Callback, CancelFitException, DeviceCB, Learner, TrainCB
from miniai.schedule import Schedule, add_noise, extract
from miniai.sgd import BatchSchedCB

HERE = Path(__file__).parent
KEPT,RESULTS = HERE.parent.parent/'_run'/'ladder',HERE/'ladder.json'
LINEAR = Schedule.linear()
FIRST = "the lesson's first recipe"

@dataclass(frozen=True)
class Recipe:
    "The lesson's first one"
    chans: tuple = (32, 64, 128, 128)
    layers: int = 2
    groups: int = 32
    attention: bool = True # at every size but the largest; else only in the middle
    fold: int = 1
    size: int = 32
    memory: bool = False # images as one tensor, instead of row by row
    init: bool = False
    lr: float = 4e-3
    eps: float = 1e-8
    clip: float = None # length of the gradient, at most
    channels_last: bool = False
    fused: bool = False
    cosine: bool = False
    v: bool = False
    gamma: float = None # of `min_snr`; all steps alike if `None`
    ema: bool = False
    mixed: bool = False
    compiled: bool = False
    batch: int = 128
    beta2: float = .999 # of Adam

RUNGS = { # in the order in which they are added up: the lever, and what it costs in clarity
    'images in memory': (dict(memory=True), 'nothing: another call'),
    'half the channels': (dict(chans=(16, 32, 64, 128), groups=8), 'two arguments'),
    'zeros at the start': (dict(init=True), 'ten lines, `init_ddpm`'),
    'Adam eps 1e-5, lr 5e-3': (dict(eps=1e-5, lr=5e-3), 'two numbers'),
    'clipped gradients': (dict(clip=1.), 'one callback'),
    'attention only in the middle block': (dict(attention=False), 'two tuples of names'),
    'one block a size': (dict(layers=1), 'one argument'),
    'fold 2×2': (dict(fold=2), 'a wrapper, `SpaceToDepth`'),
    'three sizes': (dict(chans=(16, 32, 64), groups=8), 'nothing: a number less'),
    'channels last': (dict(channels_last=True), 'one `.to`'),
    'fused Adam': (dict(fused=True), 'one argument'),
    'cosine schedule, v': (dict(cosine=True, v=True), 'a page of mathematics, a callback, a wrapper'),
    'middle steps more often': (dict(cosine=True, v=True, gamma=5.), 'a formula, and two lines'), # its weights are meant for v
    'averaged weights': (dict(ema=True), 'one callback, and to sample with it'),
}
UNUSED = { # each measured on top of all of them, and left out
    '28×28, two sizes': (dict(size=28, fold=2, chans=(16, 32), groups=8), 'nothing: two numbers less'),
    'mixed precision': (dict(mixed=True), 'another callback'),
    'torch.compile': (dict(compiled=True), 'one call, and minutes of waiting'),
}
HALF = dict(batch=64, lr=8e-3, beta2=.99)
LONG = { # each on top of all of them, too, but for whole epochs (`--full`) instead of a minute
    'half the batch': HALF,
    'early steps, too': HALF | dict(gamma=50.),
    'twice as wide': HALF | dict(chans=(32, 64, 128), lr=5e-3),
}
LESSON = dict(memory=True, chans=(16, 32, 64), groups=8, init=True, attention=False, layers=1, fold=2, eps=1e-5, beta2=.99, batch=64)
LESSONS = {'12 DDPM': Recipe(**LESSON), '12 DDPM, cosine schedule': Recipe(**LESSON, cosine=True)} # its small network, for two epochs
LEVERS = RUNGS | UNUSED
NAMES = [FIRST, *LEVERS]
AGAIN = 'fused Adam', 'averaged weights' # sums that are measured with two more seeds

@cache
def loaders(memory, size, batch):
    tfm,dd = partial(to_float, pad=(size-28)//2, lo=-1),fashion_mnist()
    if memory: return in_memory(dd, batch, device=def_device, x_tfm=tfm)
    @inplace
    def transform(b): b['image'] = [tfm(torch.from_numpy(np.array(o))[None]) for o in b['image']]
    return DataLoaders.from_dd(dd.with_transform(transform), batch)

def net(r):
    n,c = len(r.chans),r.fold**2
    attn = 'Attn' if r.attention else ''
    unet = UNet(in_channels=c, out_channels=c, block_out_channels=r.chans, layers_per_block=r.layers, norm_num_groups=r.groups,
                down_block_types=('DownBlock2D', *[f'{attn}DownBlock2D']*(n-1)), up_block_types=(*[f'{attn}UpBlock2D']*(n-1), 'UpBlock2D'))
    if r.init: init_ddpm(unet)
    model = SpaceToDepth(unet, r.fold) if r.fold > 1 else unet
    return model.to(memory_format=torch.channels_last) if r.channels_last else model

class Clock(Callback):
    "Seconds of each training step, and the end of the fit after `steps` of them"
    order = 90
    def __init__(self, steps, wait=True): self.steps,self.wait = steps,wait # wait for a GPU after each step?
    def before_fit(self, learn): self.secs,self.last = [],time.perf_counter()
    def after_batch(self, learn):
        if not learn.training: return
        if self.wait and def_device == 'cuda': torch.cuda.synchronize()
        now = time.perf_counter()
        self.secs.append(now-self.last)
        self.last = now
        if len(self.secs) >= self.steps: raise CancelFitException
    @property
    def median(self): return statistics.median_high(self.secs[len(self.secs)//4:]) # without the first ones

def train(r, steps, dls, cbs=(), seed=0, wait=True):
    "A learner that did `steps` steps, its callback for the noise, its clock and its averages"
    set_seed(seed)
    model,noise = net(r),Schedule.cosine() if r.cosine else LINEAR
    ddpm = (VPredCB if r.v else DDPMCB)(noise, min_snr(noise.ᾱ, r.gamma) if r.gamma else None)
    sched = BatchSchedCB(partial(optim.lr_scheduler.OneCycleLR, max_lr=r.lr, total_steps=max(steps, 2)))
    clock,ema = Clock(steps, wait),EMACB(.998)
    own = [MixedPrecision(dtype=torch.bfloat16) if r.mixed else TrainCB(), DeviceCB(), ddpm, sched, clock]
    if r.clip: own.append(GradClipCB(r.clip))
    if r.ema: own.append(ema)
    opt = partial(optim.Adam, betas=(.9, r.beta2), eps=r.eps, fused=r.fused)
    learn = Learner(torch.compile(model, mode='reduce-overhead') if r.compiled else model, dls, F.mse_loss, r.lr, [*own, *cbs], opt)
    learn.fit(-(-steps//len(dls.train)), valid=False)
    learn.model = model
    return learn,ddpm,clock,ema

def best(r, learn, ema): return ema.model if r.ema else learn.model

def inner(x, size): return x[..., 2:-2, 2:-2] if size == 32 else x

@torch.no_grad()
def noise_error(r, model, ddpm, dls):
    "Mean squared error of the predicted noise in 512 test images, one for each of 512 noise levels of the linear schedule"
    x0 = torch.cat([b[0] for b,_ in zip(dls.valid, range(4))])[:512].to(def_device)
    gen = torch.Generator().manual_seed(1)
    ε,levels = torch.randn(x0.shape, generator=gen).to(x0),LINEAR.ᾱ[torch.linspace(0, 999, len(x0)).round().long()]
    t = (ddpm.sched.ᾱ.cpu()[None]-levels[:,None]).abs().argmin(1).to(def_device)
    x_t,asks = add_noise(x0, ε, extract(ddpm.sched.ᾱ.to(def_device), t, x0)),NoiseFromV(model, ddpm.sched) if r.v else model
    model.eval()
    preds = torch.cat([asks(x, s) for x,s in zip(x_t.split(64), t.split(64))])
    return F.mse_loss(inner(preds, r.size), inner(ε, r.size)).item()

@cache
def judge(): return ImageEval(trained_classifier(device=def_device), in_memory(fashion_mnist(), 500, device=def_device))

def judged(samples):
    "FID and KID of whole numbers up to 255, (n, 1, 28, 28)"
    r = judge().report(samples/255)
    return dict(n=r.n, fid=r.fid, kid=r.kid, kid_se=r.kid_se, floor=r.floor)

def draw(r, model, ddpm, n=2048, steps=25, bs=256):
    "`n` samples as (n, 1, 28, 28) of whole numbers up to 255, and the seconds it took"
    gen,start = torch.Generator().manual_seed(0),time.perf_counter()
    many = [inner(ddpm.sample(model, (bs, 1, r.size, r.size), steps, generator=gen), r.size) for _ in range(n//bs)]
    return to_bytes(torch.cat(many)),time.perf_counter()-start

def to_bytes(x): return ((x.clamp(-1, 1)+1)*127.5).round().byte().cpu()

def keep(path, **tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: o.contiguous() for k,o in tensors.items()}, path)

def keep_samples(folder, name, samples):
    "All as tensors, and the first 64 as a picture"
    keep(folder/f'{name}.safetensors', samples=samples)
    Image.fromarray(to_grid(samples[:64]/127.5-1, nrow=16, scale=2)).save(folder/f'{name}.png')

def measure(name, r, seconds, sampled, seed=0):
    "Train `r` for so many seconds, judge it (its samples if `sampled`), and keep weights and samples"
    dls = loaders(r.memory, r.size, r.batch)
    steps = max(4, int(seconds/train(r, 4, dls)[2].median))
    learn,ddpm,clock,ema = train(r, steps, dls, seed=seed)
    model = best(r, learn, ema)
    res = dict(step=clock.median, steps=steps, seconds=sum(clock.secs), error=noise_error(r, model, ddpm, dls),
               parameters=sum(p.numel() for p in model.parameters()))
    path = KEPT/name.replace(': ', '-').replace(' ', '-')
    keep(path/'model.safetensors', **model.state_dict())
    if sampled:
        samples,res['sampling'] = draw(r, model, ddpm)
        keep(path/'samples.safetensors', samples=samples)
        res |= judged(samples)
    print(name, res, flush=True)
    return res

def full(name, n_epochs, n, steps):
    "Train the sum up to `name` for whole epochs, with checkpoints from which a second call goes on; then judge `n` samples"
    r,folder = summed(name),KEPT/'full'/f'{n_epochs}-{name}'.replace(' ', '-')
    dls = loaders(r.memory, r.size, r.batch)
    learn,ddpm,clock,ema = train(r, n_epochs*len(dls.train), dls, [CheckpointCB(folder, every=60, keep=2, resume=True), Say()])
    model = best(r, learn, ema)
    keep(folder/'model.safetensors', **model.state_dict())
    samples,secs = draw(r, model, ddpm, n, steps or None)
    sampler = f'DDIM {steps}' if steps else 'DDPM'
    keep_samples(folder, sampler, samples)
    known = results()
    same = [o for o in known['full'].values() if (o['recipe'], o['epochs']) == (name, n_epochs)]
    res = dict(step=clock.median if clock.secs else same[0]['step'], batch=r.batch) # a training that had ended before takes no step
    res |= dict(recipe=name, epochs=n_epochs, machine=machine(), sampler=sampler, sampling=secs) | judged(samples)
    res['clean'] = judge().fid(torch.where(samples < 12, 0, samples)/255) # what is nearly black is made black
    known['full'][f'{name}, {n_epochs} epochs, {sampler}'] = res
    write(known)
    print(res, folder)

class Say(Callback):
    "A line every 50 steps"
    order = 91
    def before_fit(self, learn): self.losses = []
    def after_batch(self, learn):
        self.losses.append(learn.loss.detach())
        if len(self.losses) < 50: return
        print(f'{time.strftime("%H:%M")} epoch {learn.epoch+1} step {learn.iter+1} loss {torch.stack(self.losses).mean():.4f}', flush=True)
        self.losses = []

def summed(name):
    "The recipe with all levers up to `name`"
    r = Recipe()
    if name == FIRST: return r
    if name in LESSONS: return LESSONS[name]
    for nm,(lever,_) in RUNGS.items():
        r = replace(r, **lever)
        if nm == name: return r
    if name in LONG: return replace(r, **LONG[name])
    if name not in UNUSED: raise SystemExit(f'no rung is called {name!r}: {", ".join([*NAMES, *LONG, *LESSONS])}')
    return replace(r, **UNUSED[name][0])

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--seconds', type=float, default=60., help='of training for each recipe')
    ap.add_argument('--full', metavar='RUNG', help='train the sum up to this rung in full instead')
    ap.add_argument('--epochs', type=int, default=5)
    ap.add_argument('--n', type=int, default=2048, help='samples of the full training, a multiple of 256')
    ap.add_argument('--steps', type=int, default=50, help='of DDIM; 0 for all of DDPM')
    args = ap.parse_args()
    if args.full: full(args.full, args.epochs, args.n, args.steps)
    else: climb(args.seconds)

def results():
    "What was measured so far"
    return json.loads(RESULTS.read_text(encoding='utf-8')) if RESULTS.exists() else dict(alone={}, sum={}, again={}, full={})
def write(res): RESULTS.write_text(json.dumps(res | dict(levers=levers()), indent=1, ensure_ascii=False), encoding='utf-8')
def levers(): return {nm: dict(cost=cost, kept=nm in RUNGS) for nm,(_,cost) in LEVERS.items()}

def climb(seconds):
    "Measure every recipe, and write what is known after each; a second call goes on with what is missing"
    here,res = dict(machine=machine(), seconds=seconds),results()
    if {k: res.get(k) for k in here} != here: res = res | here | dict(alone={}, sum={}, again={})
    todo = [('sum', nm, summed(nm), 0) for nm in NAMES]
    todo += [('again', f'{nm}, seed {i}', summed(nm), i) for i in (1, 2) for nm in reversed(AGAIN)]
    todo += [('alone', nm, replace(Recipe(), **lever), 0) for nm,(lever,_) in RUNGS.items()]
    for kind,nm,r,seed in [o for o in todo if o[1] not in res[o[0]]]:
        res[kind][nm] = measure(f'{kind}: {nm}', r, seconds, kind != 'alone', seed)
        write(res)

if __name__ == '__main__': main()
