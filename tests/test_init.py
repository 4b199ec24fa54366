"First weights, activations around zero, and convolutions with a norm"
from functools import partial
from types import SimpleNamespace

import pytest, torch
from torch import nn

import miniai.augment # noqa: F401 (it gives learners capture_preds)
from miniai.activations import set_seed
from miniai.datasets import DataLoaders
from miniai.init import BatchTransformCB, GeneralRelu, check_channels, conv, get_model, init_weights, lsuv_init, mode_kept, plot_func
from miniai.learner import Callback, Learner, TrainCB, TrainLearner

act = partial(GeneralRelu, leak=.1, sub=.4)

@pytest.mark.parametrize('leak', [None, 0., .1, 1.])
@pytest.mark.parametrize('sub', [None, .4])
@pytest.mark.parametrize('maxv', [None, 2.])
def test_general_relu_piece_by_piece(leak, sub, maxv):
    x = torch.linspace(-4, 4, 81, requires_grad=True)
    y = GeneralRelu(leak, sub, maxv)(x)
    y.sum().backward()
    for o,got,slope in zip(x.tolist(), y.tolist(), x.grad.tolist()):
        free = (o if o > 0 else (leak or 0)*o) - (sub or 0)
        want = free if maxv is None else min(free, maxv)
        assert got == pytest.approx(want, abs=1e-5)
        if abs(o) > 1e-4 and abs(free-(maxv or 9)) > 1e-4: # not at a corner
            assert slope == pytest.approx(0 if want < free else 1 if o > 0 else leak or 0)

@pytest.mark.parametrize('size', [1, 7, 8, 28])
@pytest.mark.parametrize('ks,stride', [(1, 1), (3, 1), (3, 2), (5, 2), (5, 3)])
def test_conv_keeps_or_divides_the_size(size, ks, stride):
    assert conv(2, 3, ks, stride)(torch.zeros(1, 2, size, size)).shape == (1, 3, -(-size//stride), -(-size//stride))

@pytest.mark.parametrize('norm,bias', [(nn.BatchNorm2d, False), (partial(nn.BatchNorm2d, eps=1e-3), False),
                                       (partial(nn.GroupNorm, 2), True), (None, True)])
def test_conv_has_a_bias_unless_a_batchnorm_follows(norm, bias):
    assert (conv(1, 4, norm=norm)[0].bias is not None) == bias
    for own in (True, False): assert (conv(1, 4, norm=norm, bias=own)[0].bias is not None) == own

@pytest.mark.parametrize('leaky', [0., .1, 1.])
def test_kaiming_keeps_the_mean_square(leaky):
    set_seed(0)
    x = torch.randn(16, 128, 8, 8)
    for _ in range(5):
        m = nn.Conv2d(128, 128, 3, padding=1, padding_mode='circular', bias=False).requires_grad_(False)
        init_weights(m, leaky)
        x = nn.functional.leaky_relu(m(x), leaky)
    assert x.square().mean().sqrt().item() == pytest.approx(1, abs=.15) # with PyTorch's own start it is 0.07 or less

@pytest.mark.parametrize('std', [1e-4, 1., 100.])
def test_lsuv_from_any_start(std):
    set_seed(0)
    model = get_model(act).cpu()
    for m in model.modules():
        if isinstance(m, nn.Conv2d): nn.init.normal_(m.weight, std=std)
    xb,last = torch.randn(64, 1, 28, 28),model[4][0].weight.clone()
    for layer in model[:4]: lsuv_init(model, layer[1], layer[0], xb)
    x = xb
    for layer in model[:4]:
        x = layer(x)
        assert x.mean().item() == pytest.approx(0, abs=2e-3) and x.std().item() == pytest.approx(1, abs=2e-3)
    assert torch.equal(model[4][0].weight, last) and model.training

def test_lsuv_that_gives_up_leaves_the_model_as_it_was():
    model = get_model(nn.ReLU).cpu() # never negative: no mean of 0
    model[1].eval()
    was,modes = {k: v.clone() for k,v in model.state_dict().items()},[m.training for m in model.modules()]
    with pytest.raises(ValueError, match=r'did not converge at 1\.1 \(ReLU\(\)\): it ended at mean'):
        lsuv_init(model, model[1][1], model[1][0], torch.randn(64, 1, 28, 28), max_iter=10)
    assert all(torch.equal(v, was[k]) for k,v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and not any(m._forward_hooks for m in model.modules())

def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(OSError), mode_kept(model):
        model.eval()
        raise OSError
    assert [m.training for m in model.modules()] == [True, True, False]

@pytest.mark.parametrize('wrap', [lambda m: torch.compile(m, backend='eager')], ids=['compiled'])
def test_lsuv_of_a_wrapped_model(wrap):
    "Compiled code does not call a hook that came later: the layer would be said not to be used"
    set_seed(0)
    model = nn.Sequential(conv(1, 4, act=act), nn.Flatten())
    wrapped,xb = wrap(model),torch.randn(32, 1, 9, 9)
    wrapped(xb)
    lsuv_init(wrapped, model[0][1], model[0][0], xb)
    assert model[0](xb).std().item() == pytest.approx(1, abs=2e-3) and model.training

def test_lsuv_of_a_module_that_puts_out_several_tensors():
    class Pair(nn.Module):
        def forward(self, x): return x,x+1
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.lin,self.pair = nn.Linear(4, 4),Pair()
        def forward(self, x): return self.pair(self.lin(x))[0]
    set_seed(0)
    model,xb = Net(),torch.randn(50, 4)*5
    lsuv_init(model, model.pair, model.lin, xb)
    assert model(xb).std().item() == pytest.approx(1, abs=2e-3)

# batches of any kind

def batch_of(kind, x, y):
    return {'tuple': (x, y), 'list': [x, y], 'dict': dict(x=x, y=y), 'tensor': x, 'object': SimpleNamespace(x=x, y=y)}[kind]

@pytest.mark.parametrize('kind', ['tuple', 'list', 'dict', 'tensor', 'object'])
def test_a_transform_may_give_any_kind_of_batch(kind):
    x,y = torch.randn(8, 4),torch.randn(8, 1)
    def twice(b):
        if kind in ('tuple', 'list'): return type(b)((b[0]*2, b[1]))
        if kind == 'dict': return b | dict(x=b['x']*2)
        return b*2 if kind == 'tensor' else SimpleNamespace(x=b.x*2, y=b.y)
    class Seen(Callback):
        order,seen = 5,None
        def before_batch(self, learn): self.seen = learn.batch
    b = batch_of(kind, x, y)
    learn = Learner(nn.Linear(4, 1), DataLoaders([b], [b]), lambda p,*t: p.mean(), cbs=[TrainCB(), BatchTransformCB(twice), seen := Seen()])
    learn.fit(1)
    got = seen.seen if kind == 'tensor' else vars(seen.seen)['x'] if kind == 'object' else seen.seen['x' if kind == 'dict' else 0]
    assert torch.equal(got, x*2) and type(seen.seen) is type(b)

def test_a_transform_may_make_another_kind_of_batch(model, dls):
    "Labels may be thrown away, if the steps do not ask for them"
    learn = Learner(model, dls, lambda p,*t: p.square().mean(), cbs=[TrainCB(), BatchTransformCB(lambda b: b[0])])
    learn.fit(1)
    preds,_ = learn.capture_preds()
    assert preds.shape == (69, 1)

@pytest.mark.parametrize('bad', [lambda b: None, lambda b: print(end=''), lambda b: len(b), lambda b: 'x', lambda b: nn.Identity()])
def test_what_is_no_batch_is_refused(model, dls, bad):
    with pytest.raises(ValueError, match='has to return the whole batch'): TrainLearner(model, dls, cbs=BatchTransformCB(bad)).fit(1)

@pytest.mark.parametrize('bad', [None, nn.Identity, GeneralRelu, 3, 'x'], ids=str)
def test_what_is_no_transform_is_refused(bad):
    with pytest.raises(TypeError, match='tfm'): BatchTransformCB(bad)
    BatchTransformCB(nn.Identity()); BatchTransformCB(tuple)

# wrong arguments

@pytest.mark.parametrize('steps', [0, 1, -3, 2.5, None], ids=str)
def test_a_curve_has_two_points_or_more(steps):
    with pytest.raises((ValueError, TypeError), match='steps must be'): plot_func(torch.relu, steps=steps)

@pytest.mark.parametrize('bad', [3, 'ab', [], (8, 0), (8, 2.5), ('a', 'b'), (8, -1)], ids=str)
def test_numbers_of_channels(bad):
    with pytest.raises((ValueError, TypeError), match='nfs'): get_model(nfs=bad)
    with pytest.raises((ValueError, TypeError), match='nfs'): check_channels(bad)
    assert check_channels(torch.tensor([4, 8])) == [4, 8] and check_channels(range(1, 3), least=2) == [1, 2]

def test_a_convolution_has_channels():
    for ni,nf in ((0, 2), (2, 0), (-1, 2), (1.5, 2)):
        with pytest.raises((ValueError, TypeError), match='n[if] must be'): conv(ni, nf)

@pytest.mark.parametrize('n', [0, -1, 1.5])
def test_lsuv_needs_a_pass(n):
    model = get_model(act).cpu()
    with pytest.raises((ValueError, TypeError), match='max_iter must be'):
        lsuv_init(model, model[0][1], model[0][0], torch.randn(8, 1, 28, 28), max_iter=n)
