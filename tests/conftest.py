"Tests never ask the network, and never open a window"
import os, signal

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ['MPLBACKEND'] = 'agg'
# a shell that starts pytest in the background lets it ignore Ctrl-C, which is tested
signal.signal(signal.SIGINT, signal.default_int_handler)

import matplotlib.pyplot as plt
import pytest, torch
from torch import nn
from miniai.datasets import DataLoaders

@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close('all')

@pytest.fixture
def dls():
    "Ten batches of eight and one of three, of a linear problem; five for validation"
    gen = torch.Generator().manual_seed(0)
    def batches(*sizes): return [(x := torch.randn(n, 4, generator=gen), x.sum(1, keepdim=True)) for n in sizes]
    return DataLoaders(batches(*[8]*10, 3), batches(*[16]*4, 5))

@pytest.fixture
def model():
    torch.manual_seed(1)
    return nn.Linear(4, 1)
