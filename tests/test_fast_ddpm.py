"Noise, strides, and the U-Net of the fast lesson, against diffusers and against what must be so"
import copy
from functools import partial

import pytest, torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import nn, optim

from miniai import ddpm
from miniai.accel import AccelerateCB, GradAccumCB, GradClipCB, MixedPrecision
from miniai.ema import EMACB
from miniai.activations import set_seed
from miniai.datasets import DataLoaders, TensorLoader
from miniai.ddpm import SpaceToDepth
from miniai.fast_ddpm import (DDPMCB, NoiseFromV, UNet, VPredCB, ddim_step, ddim_steps, fast_unet, init_ddpm, min_snr, noisify,
                              sample, strides)
from miniai.learner import Callback, DeviceCB, Learner, MetricsCB, TrainCB
from miniai.schedule import Schedule
from miniai.sgd import BatchSchedCB

tiny = partial(UNet, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
               down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'))

class Net(nn.Module):
    "Depends on every pixel and on t"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
    def forward(self, x, t): return self.conv(x) + .1*(t/500-1).view(-1,1,1,1)

class Knows(nn.Module):
    "The exact noise (or v), if there is only one picture in the world"
    def __init__(self, x0, sched, v=False): super().__init__(); self.x0,self.sched,self.v = x0,sched,v
    def forward(self, x, t):
        a = self.sched.ᾱ.to(x)[t].view(-1,1,1,1)
        ε = (x - a.sqrt()*self.x0)/(1-a).sqrt()
        return a.sqrt()*ε - (1-a).sqrt()*self.x0 if self.v else ε

@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()

@pytest.mark.parametrize('sched', [Schedule.linear(), Schedule.cosine(), Schedule.linear(10)])
def test_noisify_draws_from_q(sched):
    torch.manual_seed(0)
    x0 = torch.full((200_000, 1, 1, 1), .8)
    (x_t,t),ε = noisify(x0, sched.ᾱ)
    n = len(sched)
    assert t.min() == 0 and t.max() == n-1
    counts = torch.bincount(t, minlength=n).float()
    assert ((counts-len(t)/n)/(len(t)/n)**.5).abs().max() < 6
    for i in (0, n//2, n-1):
        at,a = x_t[t == i].flatten(),sched.ᾱ[i]
        assert at.mean().item() == pytest.approx((a.sqrt()*.8).item(), abs=6*((1-a)/len(at)).sqrt().item()+1e-6)
        assert at.var().item() == pytest.approx((1-a).item(), rel=6*(2/len(at))**.5)
    torch.testing.assert_close(x_t, sched.ᾱ[t].sqrt().view(-1,1,1,1)*x0 + (1-sched.ᾱ[t]).sqrt().view(-1,1,1,1)*ε)

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_noisify_keeps_the_dtype(dtype):
    (x_t,t),ε = noisify(torch.zeros(3, 2, 4, 5, dtype=dtype), Schedule.linear().ᾱ)
    assert x_t.dtype == ε.dtype == dtype and x_t.shape == (3, 2, 4, 5) and t.dtype == torch.int64

@pytest.mark.parametrize('x', [torch.zeros(4, 8, 8), torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4)])
def test_noisify_wants_images(x):
    with pytest.raises(ValueError, match=r'\(n, channels, h, w\)'): noisify(x, Schedule.linear().ᾱ)

@pytest.mark.parametrize('steps', [1, 2, 10, 50, 1000])
@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('sched', [Schedule.linear(), Schedule.cosine()], ids=['linear', 'cosine'])
def test_the_walk_is_that_of_diffusers(net, steps, clip, kind, sched):
    gen = torch.Generator()
    theirs = DDIMScheduler(trained_betas=sched.β.numpy(), timestep_spacing='trailing', clip_sample=clip, prediction_type=kind)
    theirs.set_timesteps(steps)
    net,sched = net.double(),Schedule(sched.β.double())
    theirs.alphas_cumprod,theirs.final_alpha_cumprod = sched.ᾱ,torch.ones((), dtype=torch.float64)
    x = torch.randn(3, 1, 8, 8, generator=gen.manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        for t in theirs.timesteps: x = theirs.step(net(x, t[None]), t, x, eta=0, use_clipped_model_output=clip).prev_sample
    asks = NoiseFromV(net, sched) if kind == 'v_prediction' else net
    ours = sample(asks, sched, (3,1,8,8), steps, clip=clip, generator=gen.manual_seed(1))
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('steps', [1, 3, 7, 50])
@pytest.mark.parametrize('v', [False, True])
def test_who_knows_the_picture_arrives_at_it(steps, v):
    x0,sched = torch.rand(2, 1, 6, 6, dtype=torch.float64)*2-1,Schedule.cosine(dtype=torch.float64)
    model = Knows(x0, sched, v)
    model.p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    cb = (VPredCB if v else DDPMCB)(sched)
    torch.testing.assert_close(cb.sample(model, (2,1,6,6), steps), x0)

def test_strides():
    assert strides(10, 10) == list(range(9, -1, -1)) and strides(10, 1) == [9] and strides(1000, 4) == [999, 749, 499, 249]
    for n in range(1, 101):
        ts = strides(100, n)
        assert len(ts) == n == len(set(ts)) and ts[0] == 99 and min(ts) >= 0 and ts == sorted(ts, reverse=True)
    for bad in (0, -1, 11):
        with pytest.raises(ValueError, match='1 to 10, not'): strides(10, bad)

def test_a_step_to_where_one_is_changes_nothing():
    x,ε,a = torch.randn(2, 1, 4, 4),torch.randn(2, 1, 4, 4),torch.tensor(.4)
    torch.testing.assert_close(ddim_step(x, ε, a, a, clip=False)[0], x)

def test_sampling_is_reproducible_and_leaves_the_model_alone(net):
    sched,gen = Schedule.linear(20),torch.Generator()
    for steps in (None, 5):
        a,b = [sample(net, sched, (2,1,4,4), steps, generator=gen.manual_seed(3)) for _ in range(2)]
        assert torch.equal(a, b) and not a.requires_grad
        net.train()
        for t,x,x0 in ddim_steps(net, sched, (1,1,4,4), 5): assert not net.training; break
        sample(net, sched, (1,1,4,4), steps)
        assert net.training
    with pytest.raises(ValueError, match='the model returned shape'): sample(Wrong(), sched, (1,1,4,4), 2)
    for sz in ((1,4,4), (4,)):
        with pytest.raises(ValueError, match='sz must be'): sample(net, sched, sz, 2)

class Wrong(nn.Module):
    def forward(self, x, t): return x[..., :-1]

def unets():
    resnets = UNet2DModel(in_channels=1, out_channels=1, block_out_channels=(32, 32),
                          down_block_types=('ResnetDownsampleBlock2D', 'DownBlock2D'),
                          up_block_types=('UpBlock2D', 'ResnetUpsampleBlock2D'))
    return [tiny(), fast_unet((8, 16)), SpaceToDepth(tiny(in_channels=4, out_channels=4)), resnets]

@pytest.mark.parametrize('i', range(4))
def test_it_begins_by_predicting_nothing(i):
    torch.manual_seed(i)
    model = init_ddpm(unets()[i])
    with torch.no_grad(): res = model(torch.randn(2, 1, 16, 16), torch.tensor([0, 999]))
    assert not getattr(res, 'sample', res).any()
    for m in model.modules():
        if isinstance(m, ResnetBlock2D): assert not m.conv2.weight.any() and not m.conv2.bias.any()
        if isinstance(m, Downsample2D) and isinstance(m.conv, nn.Conv2d):
            W = m.conv.weight.detach().flatten(1).T
            torch.testing.assert_close(W.T@W, torch.eye(W.shape[1]), atol=1e-5, rtol=0)

def test_it_learns_from_there():
    "All that begins with zeros gets a gradient in the end"
    torch.manual_seed(0)
    model,x,ε = init_ddpm(tiny()),torch.randn(4, 1, 16, 16),torch.randn(4, 1, 16, 16)
    opt = optim.Adam(model.parameters(), 1e-2, eps=1e-5)
    for _ in range(4):
        opt.zero_grad()
        F.mse_loss(model(x, torch.arange(4)*100), ε).backward()
        opt.step()
    still = [n for n,p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in still if not n.endswith('to_k.bias')] == [], 'a shift of all keys changes no softmax'

def test_group_norm_is_refused_before_anything_is_built(monkeypatch):
    def never(self, *args, **kwargs): raise AssertionError('built')
    monkeypatch.setattr(nn.Module, '__init__', never)
    with pytest.raises(ValueError, match=r'\[16, 20\] channels into 32 groups'): UNet(block_out_channels=(16, 20, 64, 128))
    with pytest.raises(ValueError, match=r'\[12\] channels into 8 groups'): UNet(block_out_channels=(8, 12), norm_num_groups=8)

def test_unet_is_diffusers_own(tmp_path):
    torch.manual_seed(0)
    unet,x,t = tiny().eval(),torch.randn(2, 1, 16, 16),torch.tensor([3, 700])
    unet.save_pretrained(tmp_path)
    with torch.no_grad():
        for cls in (UNet, UNet2DModel):
            res = cls.from_pretrained(tmp_path, low_cpu_mem_usage=False)(x, t)
            assert torch.equal(getattr(res, 'sample', res), unet((x, t)))
    assert unet.config.block_out_channels == (8, 16) and unet.config.norm_num_groups == 4

def small_set(n=50):
    def loader(n, **kwargs): return TensorLoader(torch.rand(n, 1, 16, 16)*2-1, torch.zeros(n), **kwargs)
    return DataLoaders(loader(n, bs=16, shuffle=True), loader(20, bs=20))

def test_it_trains_as_the_ddpm_lesson_does():
    "The same numbers drawn, the same weights in the end"
    torch.manual_seed(0)
    a = tiny()
    b = copy.deepcopy(a)
    dls = small_set()
    for model,cbs in ((a, [TrainCB(), DDPMCB()]), (b, [ddpm.DDPMCB()])):
        set_seed(3)
        Learner(model, dls, F.mse_loss, 1e-3, [*cbs, DeviceCB('cpu')], optim.Adam).fit(2)
    for p,q in zip(a.parameters(), b.parameters(), strict=True): assert torch.equal(p, q)

@pytest.mark.filterwarnings('ignore:mixed precision is meant')
@pytest.mark.parametrize('cb', [DDPMCB, VPredCB])
@pytest.mark.parametrize('engine', [TrainCB, MixedPrecision, partial(AccelerateCB, mixed_precision='no')])
def test_it_goes_with_every_engine(cb, engine):
    set_seed(0)
    model,cb,ema = fast_unet((8, 16)),cb(Schedule.cosine()),EMACB(.9)
    cbs = [engine(), DeviceCB(), cb, ema, GradAccumCB(2)]
    learn = Learner(model, small_set(), F.mse_loss, 1e-3, cbs, partial(optim.Adam, eps=1e-5))
    learn.fit(2)
    assert learn.loss.isfinite() and learn.preds.shape == learn.batch[1].shape
    own = cb.sample(model, (2,1,16,16), 4, generator=torch.Generator().manual_seed(0))
    averaged = cb.sample(ema.model, (2,1,16,16), 4, generator=torch.Generator().manual_seed(0))
    assert own.isfinite().all() and averaged.isfinite().all() and not torch.equal(own, averaged)

def test_images_that_do_not_fit():
    odd = DataLoaders([(torch.zeros(2, 1, 15, 15), torch.zeros(2))], [])
    learn = Learner(fast_unet((8, 16)), odd, F.mse_loss, cbs=[TrainCB(), DDPMCB()])
    with pytest.raises(ValueError, match='multiples of 4, not 15×15'): learn.fit(1, valid=False)
    learn.dls = DataLoaders([(torch.zeros(2, 16, 16), torch.zeros(2))], [])
    with pytest.raises(ValueError, match=r'needs images in floating point, \(n, channels, h, w\)'): learn.fit(1, valid=False)
    learn.dls = DataLoaders([(torch.zeros(2, 1, 16, 16), torch.zeros(2))], [])
    learn.fit(1, valid=False) # usable still

@pytest.mark.parametrize('gamma', [1., 5., 100.])
def test_drawing_more_often_is_weighing_the_loss(gamma):
    "The mean of any loss over t drawn by weight, and its weighted mean over t drawn evenly"
    ᾱ = Schedule.cosine().ᾱ
    w,x0 = min_snr(ᾱ, gamma),torch.zeros(200_000, 1, 1, 1)
    torch.testing.assert_close(w, torch.minimum(ᾱ/(1-ᾱ), torch.tensor(gamma))*(1-ᾱ), atol=1e-5, rtol=1e-3) # SNR+1 is 1/(1-ᾱ)
    torch.manual_seed(0)
    loss = torch.rand(1000)
    (_,t),_ = noisify(x0, ᾱ, w)
    assert loss[t].mean().item() == pytest.approx(((loss*w).sum()/w.sum()).item(), abs=.005)

@pytest.mark.parametrize('weights', [torch.ones(999), torch.zeros(1000), -torch.ones(1000), torch.full((1000,), torch.nan)])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match='weights must be 1000 numbers'): DDPMCB(Schedule.linear(), weights)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='only a GPU can be waited for')
@pytest.mark.parametrize('cb', [DDPMCB, lambda: VPredCB(Schedule.cosine(), min_snr(Schedule.cosine().ᾱ))], ids=['noise', 'v'])
@pytest.mark.parametrize('engine', [TrainCB, lambda: MixedPrecision(dtype=torch.bfloat16)], ids=['float32', 'bfloat16'])
def test_a_step_never_waits_for_the_gpu(cb, engine):
    class Strict(Callback):
        order = -100
        def before_batch(self, learn): torch.cuda.set_sync_debug_mode('error' if learn.iter else 'default') # the first step moves things
        def after_epoch(self, learn): torch.cuda.set_sync_debug_mode('default') # metrics are read then
        def cleanup_fit(self, learn): torch.cuda.set_sync_debug_mode('default')
    dl = TensorLoader(torch.rand(80, 1, 32, 32, device='cuda'), bs=16, shuffle=True)
    sched = BatchSchedCB(partial(optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=5))
    cbs = [engine(), DeviceCB(), MetricsCB(), cb(), sched, GradClipCB(1.), EMACB(.9), Strict()]
    Learner(fast_unet((8, 16)), DataLoaders(dl, dl), F.mse_loss, 1e-3, cbs, partial(optim.Adam, fused=True)).fit(1, valid=False)

S = Schedule.linear(10)

@pytest.mark.parametrize('sz', [28, 36])
def test_sizes_that_the_fast_network_cannot_take(sz):
    x,t = torch.randn(2, 1, sz, sz),torch.tensor([1, 2])
    message = f'height and width must be multiples of 8, not {sz}×{sz}: pad them'
    with pytest.raises(ValueError, match=message): fast_unet()(x, t)
    with pytest.raises(ValueError, match=message): sample(fast_unet(), S, x.shape, 2)
    with pytest.raises(ValueError, match=message): fast_unet()((x, t))
    learn = Learner(fast_unet(), DataLoaders([(x, t)], []), F.mse_loss, cbs=[TrainCB(), DDPMCB()])
    with pytest.raises(ValueError, match=message): learn.fit(1, valid=False)

@pytest.mark.parametrize('chans, fold, multiple', [((8,), 2, 2), ((8, 8), 1, 2), ((8, 8), 2, 4), ((8, 8), 4, 8), ((8, 8, 8, 8), 2, 16)])
def test_the_multiple_is_that_of_the_network(chans, fold, multiple):
    model,t = fast_unet(chans, fold),torch.tensor([1, 2])
    for k in (1, 2, 3): assert model(torch.randn(2, 1, k*multiple, multiple), t).shape == (2, 1, k*multiple, multiple)
    if multiple == 2: return
    with pytest.raises(ValueError, match=f'multiples of {multiple}, not'): model(torch.randn(2, 1, multiple, multiple*3//2), t)
    with pytest.raises(ValueError, match='multiples of 2, not 15×16'): tiny()(torch.randn(2, 1, 15, 16), t)

@pytest.mark.parametrize('c', [1, 2, 3])
def test_channels(c):
    model,x,t = fast_unet((8, 16), in_channels=c),torch.randn(2, c, 16, 16),torch.tensor([1, 2])
    assert model(x, t).shape == x.shape and sample(model, S, (2, c, 16, 16), 2).shape == x.shape
    with pytest.raises(ValueError, match=f'images of {c} channels?, not {c+1}: build it with in_channels={c+1}'):
        model(torch.randn(2, c+1, 16, 16), t)
    with pytest.raises(ValueError, match='images of 1 channel, not 3'): tiny()(torch.randn(2, 3, 16, 16), t)

@pytest.mark.parametrize('model', [fast_unet((8, 16)), tiny()], ids=['folded', 'not'])
def test_steps_that_are_missing_or_too_many(model):
    x = torch.randn(8, 1, 16, 16)
    for args in ((x,), (x, None), ((x, None),)):
        with pytest.raises(TypeError, match='t is missing'): model(*args)
    for t in (torch.zeros(3).long(), torch.zeros(8, 1), torch.zeros(0), [1]*8):
        with pytest.raises(ValueError, match='the step of each of the 8 images'): model(x, t)
    for t in (3, torch.tensor(3), torch.tensor([3]), torch.full((8,), 3)): assert model(x, t).shape == x.shape

@pytest.mark.parametrize('kw, error, message', [
    (dict(chans=16), TypeError, 'chans are the channels of each size'),
    (dict(chans=()), TypeError, 'chans'), (dict(chans=(8., 16)), TypeError, 'each of chans'),
    (dict(fold=0), ValueError, 'fold must be at least 1, not 0'), (dict(layers=0), ValueError, 'layers must be at least 1'),
    (dict(fold=1.5), TypeError, 'fold must be a whole number'), (dict(in_channels=0), ValueError, 'in_channels must be at least 1')])
def test_networks_that_cannot_be(kw, error, message):
    with pytest.raises(error, match=message): fast_unet(**kw)

@pytest.mark.parametrize('kw, error, message', [
    (dict(weights=torch.ones(3)), ValueError, 'weights must be 10 numbers'),
    (dict(weights=torch.ones(99)), ValueError, 'weights must be 10 numbers'),
    (dict(weights=torch.full((10,), torch.inf)), ValueError, 'weights must be 10 numbers'),
    (dict(weights=-torch.ones(10)), ValueError, 'weights'),
    (dict(weights=torch.full((10,), torch.nan)), ValueError, 'finite'),
    (dict(weights=torch.ones(10).long()), TypeError, r'weights.float\(\)'),
    (dict(weights=[1]*10), TypeError, 'weights must be a tensor'), (dict(ᾱ=torch.tensor([2., 3.])), ValueError, 'from 0 to 1'),
    (dict(ᾱ=torch.tensor([.5, -.1])), ValueError, 'from 0 to 1'), (dict(ᾱ=torch.tensor([.5, torch.nan])), ValueError, 'from 0 to 1'),
    (dict(ᾱ=torch.tensor(.5)), ValueError, 'a row of numbers'), (dict(ᾱ=torch.zeros(0)), ValueError, 'a row of numbers'),
    (dict(ᾱ=S), TypeError, 'ᾱ must be a tensor.*not a Schedule'), (dict(x0=None), ValueError, 'noisify needs images.*not None')])
def test_what_noisify_refuses(kw, error, message):
    for _ in range(2): # what was refused is not remembered as good
        with pytest.raises(error, match=message): noisify(**dict(x0=torch.zeros(8, 1, 4, 4), ᾱ=S.ᾱ) | kw)
    if 'weights' in kw:
        with pytest.raises(error, match=message): DDPMCB(S, **kw)

def test_noisify_looks_at_each_row_once(monkeypatch):
    from miniai import fast_ddpm
    fast_ddpm._check_numbers.cache_clear()
    cb,learn = DDPMCB(S, torch.ones(10)),Learner(tiny(), small_set(), F.mse_loss, cbs=TrainCB())
    learn.fit(3, cbs=cb)
    assert fast_ddpm._check_numbers.cache_info().misses == 1

@pytest.mark.parametrize('sched', [Schedule, 10, S.ᾱ, torch.linspace(.1, .2, 5), 'linear'])
def test_what_is_no_schedule(sched, net):
    sz = 1,1,4,4
    for f in (lambda: DDPMCB(sched), lambda: VPredCB(sched), lambda: NoiseFromV(net, sched), lambda: sample(net, sched, sz),
              lambda: sample(net, sched, sz, 2), lambda: next(ddim_steps(net, sched, sz, 2))):
        with pytest.raises(TypeError, match='needs a Schedule, such as'): f()

@pytest.mark.parametrize('f, error, message', [
    (lambda n: NoiseFromV(n, None), TypeError, 'NoiseFromV needs a Schedule'),
    (lambda n: strides(10, 2.5), TypeError, 'number of steps must be a whole number'),
    (lambda n: strides('10', 2), TypeError, "not '10'"), (lambda n: sample(n, S, (1,1,4,4), 2.), TypeError, 'not 2.0'),
    (lambda n: sample(n, S, 16, 2), ValueError, 'sz must be'), (lambda n: sample(None, S, (1,1,4,4), 2), TypeError, 'model must be'),
    (lambda n: sample(fast_unet, S, (1,1,4,4)), TypeError, 'not fast_unet itself: call it'),
    (lambda n: sample(n, S, (1,1,4,4), 2, generator=0), TypeError, 'torch.Generator'),
    (lambda n: init_ddpm(None), TypeError, 'model must be'),
    (lambda n: ddim_step(torch.zeros(1), torch.zeros(1), .5, .6), TypeError, 'ᾱ_t and ᾱ_s must be tensors'),
    (lambda n: NoiseFromV(n, S)(torch.zeros(8,1,4,4), torch.full((8,), 99)), IndexError, 't has step 99, but there are only 10'),
    (lambda n: min_snr(S.ᾱ, torch.nan), ValueError, 'a ratio above 0')])
def test_wrong_calls(net, f, error, message):
    with pytest.raises(error, match=message): f(net)

@pytest.mark.parametrize('cb', [DDPMCB, VPredCB])
def test_images_that_no_noise_hides(cb):
    x = torch.rand(4, 1, 16, 16)*255
    learn = Learner(tiny(), DataLoaders([(x, x)], []), F.mse_loss, cbs=[TrainCB(), cb()])
    with pytest.raises(ValueError, match='DDPMCB got images that run from .* which noise of variance 1'): learn.fit(1, valid=False)
    learn.dls = DataLoaders([(x/255, x)]*2, [])
    learn.fit(1, valid=False)

@pytest.mark.parametrize('cb', [DDPMCB, VPredCB])
@pytest.mark.parametrize('form', [lambda x: x, lambda x: (x,), lambda x: dict(image=x, label=x[:,0,0,0])])
def test_batches_of_any_form(cb, form):
    x = torch.rand(4, 1, 16, 16)
    learn = Learner(tiny(), DataLoaders([form(x)]*3, [form(x)]), F.mse_loss, cbs=[TrainCB(), cb(), MetricsCB()])
    learn.fit(1)
    assert learn.batch[1].shape == learn.preds.shape == x.shape

@pytest.mark.parametrize('cb', [DDPMCB, VPredCB])
def test_the_learning_rate_finder_draws_the_noise_task(cb):
    import matplotlib.pyplot as plt
    set_seed(0)
    learn = Learner(fast_unet((8, 16)), small_set(), F.mse_loss, cbs=[TrainCB(), cb(Schedule.linear(50)), EMACB(.9)], opt_func=optim.Adam)
    learn.lr_find()
    losses = plt.gca().lines[0].get_ydata()
    target = 1. if cb is DDPMCB else (learn.fit_aside(valid=True).batch[1]**2).mean().item()
    assert len(losses) > 10 and losses[0] == pytest.approx(target, abs=.15), 'it begins by predicting zero'
    learn.fit(1)
