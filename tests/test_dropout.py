"Dropout against PyTorch's, by its properties, for all shapes and types"
import math

import pytest, torch
from torch import nn

from miniai.activations import set_seed
from miniai.dropout import Dropout, Dropout2d

@pytest.mark.parametrize('ours,theirs,shape', [(Dropout, nn.Dropout, (50, 40)), (Dropout, nn.Dropout, (5, 20, 4, 5)), (Dropout2d, nn.Dropout2d, (40, 50, 3, 3))])
@pytest.mark.parametrize('p', [.05, .5, .9])
def test_moments_are_those_of_pytorch(ours, theirs, shape, p):
    set_seed(0)
    x = torch.ones(shape)
    a,b = ours(p)(x),theirs(p)(x)
    coins = math.prod(shape[:2]) if ours is Dropout2d else x.numel()
    se = math.sqrt(p/(1-p)/coins) # of the mean: each is 0 or 1/(1-p)
    assert abs(a.mean()-1) < 6*se and abs(b.mean()-1) < 6*se
    assert torch.equal(a.unique(), b.unique())

@pytest.mark.parametrize('cls', [Dropout, Dropout2d])
def test_edges(cls):
    x = torch.randn(4, 3, 5, 5)
    assert cls(0.)(x) is x and cls(.5).eval()(x) is x
    assert not cls(1.)(x).any() and cls(1.).eval()(x) is x
    for p in (-1e-9, 1+1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match='between 0 and 1'): cls(p)

@pytest.mark.parametrize('cls', [Dropout, Dropout2d])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_type_and_gradient(cls, dtype):
    x = (torch.rand(4, 30, 2, 2, dtype=dtype)+1).requires_grad_()
    y = cls(.5)(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert torch.equal(x.grad, 2*(y != 0).to(dtype))

def test_dropout2d_of_a_single_image_and_of_other_shapes():
    y = Dropout2d(.5)(torch.ones(200, 4, 6))
    assert torch.equal(y.amin((1,2)), y.amax((1,2))) and 0 < (y == 0).float().mean() < 1
    for shape in ((3,), (3, 4), (1, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match='takes'): Dropout2d()(torch.ones(shape))

def test_reproducible_and_new_each_time():
    x,drop = torch.ones(1000),Dropout(.5)
    set_seed(3); a,b = drop(x),drop(x)
    set_seed(3); assert torch.equal(a, drop(x)) and not torch.equal(a, b)
