"What several test files use. pytest puts this folder on the path: `from helpers import Recorder`"
import sys

import torch
from miniai.learner import Callback

class Recorder(Callback):
    "Writes every event down"
    def __init__(self, order=0): self.seen,self.order = [],order
    def __getattr__(self, nm):
        if nm.startswith(('before_', 'after_', 'cleanup_')): return lambda learn: self.seen.append(nm)
        raise AttributeError(nm)

class RaiseCB(Callback):
    "Raises `exc` at `event`, the `n`th time it comes"
    order = 10
    def __init__(self, event, exc, n=1): self.n,self.exc = n,exc; setattr(self, event, self._raise)
    def _raise(self, learn):
        self.n -= 1
        if self.n == 0: raise self.exc

class HandSGD:
    "As one writes it by hand: only a step, and a zero_grad that has to find gradients"
    def __init__(self, params, lr): self.params,self.lr = list(params),lr
    def step(self):
        with torch.no_grad():
            for p in self.params: p -= self.lr*p.grad
    def zero_grad(self):
        for p in self.params: p.grad.zero_()

def lines_run(module, f, interrupt=None):
    "Runs `f` and counts the lines of `module` that it passes; raises KeyboardInterrupt before line `interrupt`"
    n = 0
    def trace(frame, event, arg):
        nonlocal n
        if frame.f_code.co_filename != module.__file__: return None
        if event == 'line':
            n += 1
            if n-1 == interrupt: raise KeyboardInterrupt
        return trace
    was = sys.gettrace()
    sys.settrace(trace)
    try: f()
    finally: sys.settrace(was)
    return n

def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

def images(*sizes):
    "Batches of random images and classes, of these sizes"
    gen = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 1, 16, 16, generator=gen), torch.randint(0, 10, (n,), generator=gen)) for n in sizes]
