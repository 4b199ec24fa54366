"""What a training step costs beyond a bare PyTorch loop: a 784-50-10 network, batches of 64, one thread, on the CPU.

Short runs of the bare loop and of the Learner alternate, so that a machine that speeds up or slows down does so for both.
The clock starts at the tenth step: neither the making of an optimizer nor the first drawing of a bar counts. A figure
is the median of the differences within the pairs, with its 95 % interval. Where there is a metric, the bare loop updates it too.
"""
import contextlib, io, math, time

import torch
import torch.nn.functional as F
from torch import nn, optim
from torchmetrics.classification import MulticlassAccuracy

from miniai.datasets import DataLoaders
from miniai.learner import DeviceCB, Learner, MetricsCB, ProgressCB, TrainCB

PAIRS,STEPS,SKIP = 600,60,10
torch.set_num_threads(1)
torch.manual_seed(0)
batches = [(torch.randn(64, 784), torch.randint(0, 10, (64,))) for _ in range(STEPS)]
acc = MulticlassAccuracy(num_classes=10, average='micro', validate_args=False)

class Timed:
    "The batches, and how long they took from number SKIP to the end, in µs a step"
    def __len__(self): return STEPS
    def __iter__(self):
        for i,b in enumerate(batches):
            if i == SKIP: start = time.perf_counter()
            yield b
        self.µs = (time.perf_counter()-start)/(STEPS-SKIP)*1e6

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

def learner(dl, *cbs):
    Learner(mlp(), DataLoaders(dl, []), F.cross_entropy, cbs=[TrainCB(), DeviceCB('cpu'), *cbs]).fit(1, valid=False)

def µs(run, *args):
    with contextlib.redirect_stdout(io.StringIO()): run(dl := Timed(), *args)
    return dl.µs

def compare(name, bare_args, cbs):
    def pair(first):
        if first: a = µs(bare, *bare_args)
        b = µs(learner, *cbs)
        return (a if first else µs(bare, *bare_args)),b
    for i in range(20): pair(i%2) # warm up
    pairs = [pair(i%2) for i in range(PAIRS)]
    added = sorted(b-a for a,b in pairs)
    half = round(.98*math.sqrt(PAIRS)) # order statistics: a 95 % interval of the median
    lo,mid,hi = (added[PAIRS//2+k] for k in (-half, 0, half))
    base = sorted(a for a,_ in pairs)[PAIRS//2]
    print(f'{name:44} bare loop {base:6.1f} µs a step, added {mid:5.1f} µs (95 %: {lo:.1f} to {hi:.1f})', flush=True)

print(f'torch {torch.__version__}, {PAIRS} pairs of {STEPS} steps')
compare('TrainCB, DeviceCB', (), ())
compare('TrainCB, DeviceCB, MetricsCB, ProgressCB', (acc,), (MetricsCB(accuracy=acc), ProgressCB()))
