"A look at model, images and predictions changes nothing; erasing and copying"
import matplotlib.pyplot as plt
import pytest, torch
import torch.nn.functional as F
from helpers import RaiseCB, images, weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from miniai.activations import set_seed
from miniai.augment import RandCopy, RandErase, rand_copy, rand_erase
from miniai.datasets import DataLoaders
from miniai.init import BatchTransformCB, get_model
from miniai.learner import Learner, TrainCB

@pytest.fixture
def image_learner():
    set_seed(0)
    return Learner(get_model(norm=nn.BatchNorm2d).cpu(), DataLoaders(images(8, 8), images(16, 3)), F.cross_entropy, lr=.1, cbs=TrainCB())

def test_summary(image_learner, capsys):
    before = {k: v.clone() for k,v in image_learner.model.state_dict().items()}
    image_learner.summary()
    out = capsys.readouterr().out
    with FlopCounterMode(display=False) as counter: image_learner.model.eval()(torch.randn(1, 1, 16, 16))
    params = sum(p.numel() for p in image_learner.model.parameters())
    assert f'Tot params: {params}; MFLOPS: {counter.get_total_flops()/1e6:.1f}\n' in out
    assert sum(line.startswith('|Sequential|') for line in out.splitlines()) == 5
    assert all(torch.equal(v, before[k]) for k,v in image_learner.model.state_dict().items())

@pytest.mark.parametrize('layer,shape', [
    (nn.Conv2d(4, 8, 3, stride=2, padding=1), (4, 9, 7)), (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 9, 7)),
    (nn.Conv2d(4, 8, 3, dilation=2), (4, 9, 7)), (nn.Conv1d(3, 5, 3), (3, 20)), (nn.Conv3d(2, 3, 3), (2, 5, 6, 7)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5)), (nn.Linear(6, 7), (6,)), (nn.Linear(6, 7, bias=False), (5, 6)),
    (nn.BatchNorm2d(4), (4, 9, 7)), (nn.GroupNorm(2, 4), (4, 9, 7)), (nn.LayerNorm(6), (5, 6))], ids=str)
def test_parameters_and_flops_of_a_layer(layer, shape, capsys):
    x = torch.randn(3, *shape)
    Learner(nn.Sequential(layer), DataLoaders([], [(x, 0)]), lambda p,t: p.mean(), cbs=TrainCB()).summary()
    with FlopCounterMode(display=False) as counter: layer(x)
    row = next(l for l in capsys.readouterr().out.splitlines() if l.startswith(f'|{type(layer).__name__}|')).split('|')
    assert row[4] == f'{sum(p.numel() for p in layer.parameters()):,}' and row[5] == f'{counter.get_total_flops()/3e6:.2f}'

def test_show_image_batch_shows_what_the_model_would_be_given(image_learner):
    before = weights(image_learner.model)
    image_learner.show_image_batch(max_n=4, cbs=BatchTransformCB(lambda b: (torch.ones_like(b[0]), b[1]), on_val=False), imsize=1)
    axs = plt.gcf().axes
    assert len(axs) == 4 and all((ax.images[0].get_array() == 1).all() for ax in axs)
    assert torch.equal(before, weights(image_learner.model))

@pytest.mark.parametrize('inps', [False, True])
def test_capture_preds_is_the_model_on_the_whole_set(image_learner, inps):
    xs,ys = map(torch.cat, zip(*image_learner.dls.valid))
    preds,targs,*rest = image_learner.capture_preds(inps=inps)
    with torch.no_grad(): assert torch.allclose(preds, image_learner.model.eval()(xs), atol=1e-5)
    assert torch.equal(targs, ys) and len(rest) == inps and all(torch.equal(o, xs) for o in rest)

@pytest.mark.parametrize('look', ['summary', 'show_image_batch', 'capture_preds'])
@pytest.mark.parametrize('fails', [False, True])
def test_a_look_changes_nothing(image_learner, look, fails):
    learn = image_learner
    learn.model[1].eval() # as if it were frozen
    if fails: learn.cbs.append(RaiseCB('before_batch', OSError()))
    was = {k: v.clone() for k,v in learn.model.state_dict().items()},[m.training for m in learn.model.modules()],list(learn.cbs)
    try: getattr(learn, look)()
    except OSError: assert fails
    else: assert not fails
    assert all(torch.equal(v, was[0][k]) for k,v in learn.model.state_dict().items())
    assert ([m.training for m in learn.model.modules()], learn.cbs) == was[1:] and not any(m._forward_hooks for m in learn.model.modules())

@pytest.mark.parametrize('f', [rand_erase, rand_copy, RandErase, RandCopy])
@pytest.mark.parametrize('shape', [(1, 20, 30), (5, 3, 20, 30)])
def test_boxes_of_the_size_that_was_asked_for(f, shape):
    set_seed(0)
    x = torch.rand(shape)
    was,shares = x.clone(),[]
    for _ in range(40):
        out = f(x, .3, 2) if f in (rand_erase, rand_copy) else f(.3, 2)(x)
        shares.append((out != x).float().mean().item())
        assert out.min() >= x.min() and out.max() <= x.max()
    assert torch.equal(x, was) and min(shares) == 0 # no box at all is one of three cases
    assert 0.09 < max(shares) <= 2*.09 + 1e-6

@pytest.mark.parametrize('f', [rand_erase, rand_copy])
def test_boxes_of_no_size_and_of_all_of_it(f):
    set_seed(0)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(f(x, 0.), x) and torch.equal(f(x, max_num=0), x)
    assert torch.equal(rand_copy(x, 1.), x) # onto itself
    assert any((rand_erase(x, 1.) != x).float().mean() > .9 for _ in range(20))
