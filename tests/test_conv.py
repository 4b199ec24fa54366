"Convolutions keep their promised sizes, batches move whole, and a model is found inside any wrapper"
import math

import pytest, torch
from torch import nn

from miniai.conv import collate_device, conv, def_device, run_info, to_device, unwrap_model
from miniai.datasets import drawn

@pytest.mark.parametrize('size', [1, 7, 28])
@pytest.mark.parametrize('ks', [1, 3, 5])
@pytest.mark.parametrize('stride', [1, 2, 3])
def test_only_the_stride_changes_the_size(size, ks, stride):
    assert conv(2, 5, ks, stride)(torch.randn(3, 2, size, size)).shape == (3, 5, *[math.ceil(size/stride)]*2)

def test_the_activation_is_left_out_where_asked():
    x = torch.randn(4, 1, 8, 8)
    assert conv(1, 9)(x).min() == 0 and conv(1, 9, act=False)(x).min() < 0

@pytest.mark.parametrize('ks', [0, 2, 4])
def test_a_window_without_a_middle_is_refused(ks):
    with pytest.raises(ValueError, match='odd width'): conv(1, 1, ks)

def test_every_tensor_in_a_batch_is_moved():
    moved = to_device(dict(a=[torch.ones(1), (torch.zeros(2), 'name')], b=3), 'meta')
    assert moved['a'][0].device.type == moved['a'][1][0].device.type == 'meta' and (moved['a'][1][1], moved['b']) == ('name', 3)
    assert to_device(x := torch.ones(1), 'cpu') is x

def test_rows_become_a_batch_on_the_device():
    x,y = collate_device([(torch.ones(2), 1), (torch.zeros(2), 2)])
    assert x.device.type == y.device.type == def_device and y.tolist() == [1, 2]

def test_the_line_that_says_where_we_are(monkeypatch):
    monkeypatch.setenv('MINIAI_BUDGET', 'full')
    line = run_info(drawn(20, 10))
    assert line.startswith(f'budget full | device {def_device} | ') and line.endswith(': 20 train + 10 test')

@pytest.fixture
def one_process(tmp_path):
    "A process group of this process alone, as DistributedDataParallel needs one"
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

def test_the_model_inside_its_wrappers(one_process, model):
    ddp = nn.parallel.DistributedDataParallel(model)
    compiled = torch.compile(model, backend='eager')
    wrappers = [ddp, compiled, torch.compile(ddp, backend='eager'), nn.parallel.DistributedDataParallel(compiled)]
    assert all(w is not model and unwrap_model(w) is model for w in wrappers) and unwrap_model(model) is model
