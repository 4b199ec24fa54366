"""What an accelerator makes of the ladder's recipes: seconds a step, five epochs in seconds, and what it waits for.

    python tests/bench/gpu.py      # a few minutes on a data-centre GPU; then `ladder.py --show` has its figures

Each training is timed from an untrained network to the end of its last step, with what the GPU does when it is first used
left out: 20 steps of it go before. Results: 'gpu' in tests/bench/ladder.json, nbs/images/gpu.png; weights and samples:
_run/ladder.
"""
import argparse, time
from dataclasses import replace

import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function

import ladder
from ladder import FIRST, HERE, KEPT, LEVERS, NAMES, RUNGS, Judge, Recipe, best, def_device, draw, keep, loaders, results, summed, train, write
from miniai.datasets import DataLoaders
from miniai.ddpm import to_grid

LARGE = dict(mixed=True, batch=512, lr=1e-2)
FIVE = { # five epochs each
    "the lesson's halved recipe": replace(summed('Adam eps 1e-5, lr 5e-3'), **LARGE),
    "its network, and all other levers": replace(summed('averaged weights'), **LARGE, chans=(16, 32, 64, 128), layers=2, attention=True, fold=1),
    'all levers, in batches of 128': summed('averaged weights'),
    'all levers': replace(summed('averaged weights'), **LARGE),
}
PROFILED = "the lesson's halved recipe", 'all levers, in batches of 128', 'all levers'

def times():
    "Seconds a step of each recipe, alone and in sum"
    res = dict(sum={}, alone={})
    todo = [('sum', nm, summed(nm)) for nm in NAMES] + [('alone', nm, replace(Recipe(), **lever)) for nm,(lever,_) in RUNGS.items()]
    for kind,nm,r in sorted(todo, key=lambda o: o[2].compiled): # the compiler last: it takes a while
        res[kind][nm] = train(r, 24, loaders(r.memory, r.size, r.batch))[2].median
        print(kind, nm, f'{res[kind][nm]*1000:.1f} ms', flush=True)
    return res

def five(name, r, judge):
    "Five epochs, without a look at the clock in between"
    dls = loaders(r.memory, r.size, r.batch)
    train(r, 20, dls)
    torch.cuda.synchronize()
    start = time.perf_counter()
    learn,ddpm,clock,ema = train(r, 5*len(dls.train), dls, wait=False)
    torch.cuda.synchronize()
    secs = time.perf_counter()-start
    with best(r, learn, ema) as model: samples,sampling = draw(r, model, ddpm, steps=50, bs=1024)
    folder = KEPT/'gpu'/name.replace(' ', '-')
    keep(folder/'samples.safetensors', samples=samples)
    Image.fromarray(to_grid(samples[:64]/127.5-1, nrow=16, scale=2)).save(folder/'samples.png')
    res = dict(batch=r.batch, steps=len(clock.secs), seconds=secs, sampling=sampling, distance=judge(samples))
    print(name, res, flush=True)
    return res

class Watched:
    "A loader that says in a profile when it works"
    def __init__(self, dl): self.dl = dl
    def __len__(self): return len(self.dl)
    def __iter__(self):
        it = iter(self.dl)
        while True:
            with record_function('loader'):
                try: b = next(it)
                except StopIteration: return
            yield b

class Mark(ladder.Callback):
    "Says in a profile when a step begins and ends, for those from `first` on; with `strict`, forbids to wait for the GPU there"
    order = -100
    def __init__(self, first, strict=False): self.first,self.strict = first,strict
    def before_fit(self, learn): self.n = 0
    def before_batch(self, learn):
        self.n += 1
        if self.n == self.first and self.strict: torch.cuda.set_sync_debug_mode('error')
        self.step = record_function('step').__enter__()
    def after_batch(self, learn): self.step.__exit__(None, None, None)
    def cleanup_fit(self, learn): torch.cuda.set_sync_debug_mode('default')

def profiled(r, n=12):
    "Steps of `r` after a warm-up: spans of (start, end) in ms of the loader, of the steps on the CPU, and of the GPU; calls that wait for it"
    dls = loaders(r.memory, r.size, r.batch)
    train(r, 3*n, dls, [Mark(10, strict=True)], wait=False) # raises an error at the first wait
    watched = DataLoaders(Watched(dls.train), dls.valid)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        train(r, 2*n, watched, [Mark(0)], wait=False)
        torch.cuda.synchronize()
    events = prof.events()
    cpu = [e for e in events if e.device_type.name == 'CPU']
    steps = sorted((e.time_range.start, e.time_range.end) for e in cpu if e.name == 'step')[n:]
    begin,end = steps[0][0],steps[-1][1]
    def spans(evs): return [((e.time_range.start-begin)/1e3, (e.time_range.end-begin)/1e3) for e in evs if begin <= e.time_range.start < end]
    gpu = [e for e in events if e.device_type.name == 'CUDA' and e.name not in ('step', 'loader') and not e.name.startswith('Optimizer')]
    waits = sorted({e.name for e in cpu if 'ynchronize' in e.name and begin <= e.time_range.start < end})
    return dict(loader=spans([e for e in cpu if e.name == 'loader']), steps=[((a-begin)/1e3, (b-begin)/1e3) for a,b in steps], gpu=merged(spans(gpu)), waits=waits)

def merged(spans, gap=.005):
    "Spans that touch, or nearly, as one"
    res = []
    for a,b in sorted(spans):
        if res and a <= res[-1][1]+gap: res[-1][1] = max(res[-1][1], b)
        else: res.append([a, b])
    return res

def summary(p):
    "Shares of the time from the first step to the last in which GPU and loader work, and ms a step"
    total = p['steps'][-1][1]
    share = lambda spans: sum(min(b, total)-a for a,b in spans if a < total)/total
    return dict(gpu=share(p['gpu']), loader=share(p['loader']), ms=total/len(p['steps']), waits=p['waits'])

def chart(profiles, path, n=4):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig,axs = plt.subplots(len(profiles), 1, figsize=(11, 1.5*len(profiles)), layout='constrained')
    for ax,(name,p) in zip(axs, profiles.items()):
        for y,(key,color) in enumerate((('loader', 'C3'), ('steps', 'C0'), ('gpu', 'C2'))):
            ax.broken_barh([(a, b-a) for a,b in p[key] if a < p['steps'][n-1][1]], (y-.35, .7), color=color, edgecolor='w' if key == 'steps' else 'none', lw=.8)
        ax.set_yticks(range(3), ['loader', 'Python, step by step', 'GPU']); ax.set_xlim(0, p['steps'][n-1][1]); ax.invert_yaxis()
        ax.set_title(name, size=9)
    axs[-1].set_xlabel('ms')
    fig.savefig(path, dpi=80)

def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if def_device != 'cuda': raise SystemExit('this needs a CUDA GPU')
    judge,res = Judge(),dict(machine=ladder.machine())
    res['five'] = {name: five(name, r, judge) for name,r in FIVE.items()}
    profiles = {name: profiled(FIVE[name]) for name in PROFILED}
    chart(profiles, HERE.parent.parent/'nbs'/'images'/'gpu.png')
    res['profiles'] = {name: summary(p) for name,p in profiles.items()}
    print(res['profiles'])
    write(results() | dict(gpu=res))
    res |= times()
    write(results() | dict(gpu=res))

if __name__ == '__main__': main()
