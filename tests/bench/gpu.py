"""What a GPU makes of the ladder's recipes: five epochs in seconds, and what it waits for.

    python tests/bench/gpu.py      # some minutes on a data-centre GPU

Each training is timed from an untrained network to the end of its last step; what the GPU does when it is first used is left
out (20 steps go before), but compiling counts. A step that waits for the GPU is an error. Results: 'gpu' in
tests/bench/ladder.json, and nbs/images/gpu.png, or with --out, gpu.json and gpu.png there; samples: _run/ladder/gpu.
"""
import argparse, json, time
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ladder import FIRST, HERE, KEPT, best, def_device, draw, judged, keep_samples, loaders, machine, results, summed, train, write
from miniai.datasets import DataLoaders
from miniai.learner import Callback

FAST = summed('averaged weights')
LARGE = 'bfloat16, batches of 512'
RECIPES = {
    'as on a CPU': FAST,
    LARGE: replace(FAST, mixed=True, batch=512),
    'torch.compile': replace(FAST, compiled=True, batch=125), # there is no smaller last batch, which would be compiled anew
}

def times():
    "Seconds a step of three recipes"
    rs = {nm: summed(nm) for nm in (FIRST, 'half the channels', 'averaged weights')}
    return {nm: train(r, 24, loaders(r.memory, r.size, r.batch))[2].median for nm,r in rs.items()}

def five(name, r):
    "Five epochs, without a look at the clock in between"
    dls = loaders(r.memory, r.size, r.batch)
    if not r.compiled: train(r, 20, dls)
    torch.cuda.synchronize()
    start = time.perf_counter()
    learn,ddpm,clock,ema = train(r, 5*len(dls.train), dls, wait=False)
    torch.cuda.synchronize()
    secs = time.perf_counter()-start
    samples,sampling = draw(r, best(r, learn, ema), ddpm, steps=50, bs=1024)
    keep_samples(KEPT/'gpu', name, samples)
    res = dict(batch=r.batch, steps=len(clock.secs), step=clock.median, seconds=secs, sampling=sampling) | judged(samples)
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

class Mark(Callback):
    "Says in a profile when a step begins and ends"
    order = -100
    def before_batch(self, learn): self.step = record_function('step').__enter__()
    def after_batch(self, learn): self.step.__exit__(None, None, None)

class Strict(Callback):
    "Forbids to wait for the GPU, from the tenth step on"
    order = -100
    def before_batch(self, learn):
        if learn.iter == 9: torch.cuda.set_sync_debug_mode('error')
    def cleanup_fit(self, learn): torch.cuda.set_sync_debug_mode('default')

def profiled(r, n=12):
    "Steps of `r` after a warm-up: spans (start, end) in ms of the loader, of the steps on the CPU, and of the GPU; calls that wait for it"
    dls = loaders(r.memory, r.size, r.batch)
    train(r, 3*n, dls, [Strict()], wait=False) # raises an error at the first wait
    watched = DataLoaders(Watched(dls.train), dls.valid)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        train(r, 2*n, watched, [Mark()], wait=False)
        torch.cuda.synchronize()
    events = prof.events()
    cpu = [e for e in events if e.device_type.name == 'CPU']
    steps = sorted((e.time_range.start, e.time_range.end) for e in cpu if e.name == 'step')[n:]
    begin,end = steps[0][0],steps[-1][1]
    def ms(a, b): return (a-begin)/1e3,(b-begin)/1e3
    def spans(evs): return [ms(e.time_range.start, e.time_range.end) for e in evs if begin <= e.time_range.start < end]
    gpu = [e for e in events if e.device_type.name == 'CUDA' and e.name not in ('step', 'loader') and not e.name.startswith('Optimizer')]
    waits = sorted({e.name for e in cpu if 'ynchronize' in e.name and begin <= e.time_range.start < end})
    loader = spans([e for e in cpu if e.name == 'loader'])
    return dict(loader=loader, steps=[ms(*o) for o in steps], gpu=merged(spans(gpu)), waits=waits)

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

def chart(profiles, path, ms=120):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig,axs = plt.subplots(len(profiles), 1, figsize=(11, 1.4*len(profiles)), sharex=True, layout='constrained')
    for ax,(name,p) in zip(axs, profiles.items()):
        for y,(key,color) in enumerate((('loader', 'C3'), ('steps', 'C0'), ('gpu', 'C2'))):
            edge = 'w' if key == 'steps' else 'none'
            ax.broken_barh([(a, b-a) for a,b in p[key] if a < ms], (y-.35, .7), color=color, edgecolor=edge, lw=.8)
        ax.set_yticks(range(3), ['loader', 'Python, step by step', 'GPU']); ax.set_xlim(0, ms); ax.invert_yaxis()
        ax.set_title(name, size=9)
    axs[-1].set_xlabel('ms')
    fig.savefig(path, dpi=80)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, help='a folder for the results, in place of the repository')
    out = parser.parse_args().out
    if def_device != 'cuda': raise SystemExit('this needs a CUDA GPU')
    res = dict(machine=machine())
    def save(): # as results come: a time limit loses nothing
        if out: (out/'gpu.json').write_text(json.dumps(res, indent=1))
    res['five'] = {}
    for name in (LARGE, 'torch.compile'): res['five'][name] = five(name, RECIPES[name]); save()
    profiles = {name: profiled(r) for name,r in RECIPES.items()}
    chart(profiles, (out or HERE.parent.parent/'nbs'/'images')/'gpu.png')
    res['profiles'] = {name: summary(p) for name,p in profiles.items()}; save()
    res['step'] = times(); save()
    print(res)
    if not out: write(results() | dict(gpu=res))

if __name__ == '__main__': main()
