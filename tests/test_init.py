"First weights, activations around zero, and convolutions with a norm"
from functools import partial

import pytest, torch
from torch import nn

from miniai.activations import set_seed
from miniai.init import GeneralRelu, conv, get_model, init_weights, lsuv_init, mode_kept

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
