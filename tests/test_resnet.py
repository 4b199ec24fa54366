"The block, its layers by position, and the names that pickles of it hold"
import io, pickle, pickletools
from functools import partial

import pytest, torch
from fastcore.basics import noop
from torch import nn

from miniai.init import GeneralRelu
from miniai.resnet import ResBlock

def test_resblock_by_index():
    block = ResBlock(4, 8, stride=2, norm=nn.BatchNorm2d)
    assert isinstance(block.convs[-1][-1], nn.BatchNorm2d) and isinstance(block.convs[0][-1], GeneralRelu)
    assert block.idconv[0].kernel_size == (1,1) and block.convs[-1][0].stride == (2,2)
    assert isinstance(ResBlock(4, 8).convs[-1][-1], nn.Conv2d) and ResBlock(4, 4).idconv is noop
    twin = ResBlock(4, 8, stride=2, norm=nn.BatchNorm2d)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 4, 7, 7)
    assert torch.equal(block(x), twin(x)) and block(x).shape == (2, 8, 4, 4)

@pytest.mark.parametrize('norm', [nn.BatchNorm2d, partial(nn.GroupNorm, 2), nn.InstanceNorm2d, None])
@pytest.mark.parametrize('ni', [4, 8])
def test_resblock_passes_its_norm_on_to_every_convolution(norm, ni):
    "Lesson D1: one that forgets has no norm at all, trains, and nobody notices"
    block = ResBlock(ni, 8, norm=norm)
    convs = [m for m in block.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Conv2d)]
    assert len(convs) == (2 if ni == 8 else 3)
    if norm: assert all(isinstance(c[1], getattr(norm, 'func', norm)) for c in convs)
    assert sum(isinstance(m, (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)) for m in block.modules()) == (len(convs) if norm else 0)

def test_pickles_name_these_modules():
    buf = io.BytesIO()
    pickle.dump(nn.Sequential(ResBlock(4, 4)), buf, protocol=2)
    names = {arg for op,arg,_ in pickletools.genops(buf.getvalue()) if op.name == 'GLOBAL'}
    assert {'miniai.resnet ResBlock', 'miniai.init GeneralRelu'} <= names
    assert pickle.loads(b'cfastcore.basics\nnoop\n.') is ResBlock(4, 4).idconv # as pickles of the course name it

def test_layers_may_be_deleted_from_a_sequential():
    model = nn.Sequential(ResBlock(1, 8), ResBlock(8, 16, stride=2), nn.Flatten(), nn.Linear(16, 10), nn.BatchNorm1d(10))
    del model[4]; del model[3]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 16*4*4)

def test_a_block_without_an_activation():
    block = ResBlock(4, 4, act=None).eval()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), block.convs(x)+x) and not any(isinstance(m, GeneralRelu) for m in block.modules())
    for bad in (nn.ReLU(), True):
        with pytest.raises(TypeError, match='act is'): ResBlock(4, 4, act=bad)
    with pytest.raises(ValueError, match='nf must be at least 1'): ResBlock(4, 0)
