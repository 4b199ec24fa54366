"""What a training step costs beyond a bare PyTorch loop: a 784-50-10 network, batches of 64, one thread, on the CPU.

    python tests/bench/learner.py                   # the Learner
    python tests/bench/learner.py --against REV     # and beside it, in the same run, that of another revision of this repository

Short runs of the bare loop and of the Learners take turns, so that a machine that speeds up or slows down does so for all.
The clock starts at the tenth step: neither the making of an optimizer nor the first drawing of a bar counts. A figure is
the median of the differences within a round, with its 95 % interval: in time on the wall, and in CPU time of the thread,
which others on a busy machine do not blur. Where there is a metric, the bare loop updates it too.
With --save the results go to tests/bench/learner.json, which the notebook 92 draws.
"""
import argparse, contextlib, io, json, math, subprocess, sys, time, types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn, optim
from torchmetrics.classification import MulticlassAccuracy

import miniai.learner
from machine import machine
from miniai.datasets import DataLoaders

ROUNDS,STEPS,SKIP = 600,60,10
HERE = Path(__file__).parent
torch.set_num_threads(1)
torch.manual_seed(0)
batches = [(torch.randn(64, 784), torch.randint(0, 10, (64,))) for _ in range(STEPS)]
acc = MulticlassAccuracy(num_classes=10, average='micro', validate_args=False)
clocks = time.perf_counter,time.thread_time

class Timed:
    "The batches, and how long they took from number SKIP to the end, in µs a step: on the wall, and of the thread"
    def __len__(self): return STEPS
    def __iter__(self):
        for i,b in enumerate(batches):
            if i == SKIP: start = [c() for c in clocks]
            yield b
        self.µs = [(c()-s)/(STEPS-SKIP)*1e6 for c,s in zip(clocks, start)]

def mlp(): return nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))

def bare(dl, metric=None):
    model = mlp()
    opt = optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for xb,yb in dl:
        preds = model(xb)
        loss = F.cross_entropy(preds, yb)
        loss.backward()
        opt.step()
        opt.zero_grad()
        if metric is not None: metric.update(preds.detach(), yb)

def run(module, dl, full):
    cbs = [module.TrainCB(), module.DeviceCB('cpu'), *([module.MetricsCB(accuracy=acc), module.ProgressCB()] if full else [])]
    module.Learner(mlp(), DataLoaders(dl, []), F.cross_entropy, cbs=cbs).fit(1, valid=False)

def µs(f):
    dl = Timed()
    with contextlib.redirect_stdout(io.StringIO()): f(dl)
    return dl.µs

def at(rev):
    "The module `learner` as it was at `rev`, in today's package"
    source = subprocess.run(['git', 'show', f'{rev}:miniai/learner.py'], cwd=HERE, capture_output=True, text=True)
    if source.returncode: sys.exit(f'git has no {rev}:miniai/learner.py: {source.stderr.strip()}')
    module = types.ModuleType('miniai.learner_before')
    module.__package__ = 'miniai'
    sys.modules[module.__name__] = module
    exec(compile(source.stdout, f'learner.py at {rev}', 'exec'), vars(module))
    return module

def interval(xs):
    "Median, and its 95 % interval by order statistics"
    xs,half = sorted(xs),round(.98*math.sqrt(len(xs)))
    return [xs[len(xs)//2+k] for k in (0, -half, half)]

def compare(name, full, modules):
    runs = {'bare loop': lambda: µs(lambda dl: bare(dl, acc if full else None))}
    runs |= {nm: lambda m=m: µs(lambda dl: run(m, dl, full)) for nm,m in modules.items()}
    rounds = [{nm: runs[nm]() for nm in (runs if i%2 else reversed(runs))} for i in range(ROUNDS+20)][20:] # the first ones warm up
    def added(nm, i): return dict(zip(('added', 'lo', 'hi'), interval([r[nm][i]-r['bare loop'][i] for r in rounds])))
    base = interval([r['bare loop'][0] for r in rounds])[0]
    res = {nm: dict(wall=added(nm, 0), thread=added(nm, 1)) for nm in modules}
    print(f'{name}: the bare loop takes {base:.1f} µs a step')
    for nm,clocks in res.items():
        says = [f"{c['added']:5.1f} µs {k} (95 %: {c['lo']:.1f} to {c['hi']:.1f})" for k,c in clocks.items()]
        print(f'  {nm:20} adds {", ".join(says)}', flush=True)
    return {'bare loop': base} | res

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--against', metavar='REV', help='a revision of this repository')
    parser.add_argument('--save', action='store_true', help='keep the figures in tests/bench/learner.json')
    args = parser.parse_args()
    rev = args.against
    modules = {'Learner': miniai.learner} | ({f'Learner at {rev}': at(rev)} if rev else {})
    print(f'{machine()}, {ROUNDS} rounds of {STEPS} steps each')
    res = {nm: compare(nm, full, modules) for nm,full in (('TrainCB, DeviceCB', False), ('TrainCB, DeviceCB, MetricsCB, ProgressCB', True))}
    kept = json.dumps(dict(machine=machine(), **res), indent=1, ensure_ascii=False)
    if args.save: (HERE/'learner.json').write_text(kept+'\n', encoding='utf-8')

if __name__ == '__main__': main()
