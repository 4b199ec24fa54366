"Noising and sampling against diffusers, and against distributions whose answer is known"
import math

import pytest, torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from miniai.datasets import DataLoaders
from miniai.ddpm import (DDPMCB, SpaceToDepth, check_sizes, ddpm_sample, ddpm_steps, posterior_coefs, predict_noise, pure_noise, save_gif,
                         sizes_taken, to_grid)
from miniai.learner import Learner, TrainCB
from miniai.schedule import Schedule

def reference(n_steps=1000): return DDPMScheduler(n_steps, 0.0001, 0.02, variance_type='fixed_large', clip_sample=True)

class Wavy(nn.Module):
    "Any smooth function of x and t will do as a model"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.tensor(.7))
    def forward(self, x, t): return (x*self.w).sin() + .1*x.roll(1, -1) + (t/1000).view(-1,1,1,1).to(x)

def batch_of(cb, x0):
    class Take(nn.Module):
        def forward(self, x, t): return x
    learn = Learner(Take(), DataLoaders([], [(x0, torch.zeros(len(x0)))]), F.mse_loss, cbs=cb, opt_func=None)
    learn.fit(1, train=False)
    return *learn.batch[0],learn.batch[1]

@pytest.mark.parametrize('sz', [(4,1,32,32), (2,3,16,16), (1,1,8,8)])
def test_noised_images_are_those_of_diffusers(sz):
    torch.manual_seed(0)
    x0 = torch.rand(sz)*2-1
    x_t,t,ε = batch_of(DDPMCB(), x0)
    torch.testing.assert_close(x_t, reference().add_noise(x0, ε, t), atol=1e-6, rtol=1e-5)

@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('sz,dtype', [((2,1,16,16), torch.float32), ((2,3,8,8), torch.float32), ((1,1,8,8), torch.float64)])
def test_a_whole_run_is_that_of_diffusers(seed, sz, dtype):
    model,ref,gen = Wavy().to(dtype),reference(),torch.Generator().manual_seed(seed)
    x = torch.randn(sz, generator=gen, dtype=dtype)
    with torch.no_grad():
        for t in ref.timesteps: x = ref.step(model(x, t.expand(sz[0])), t, x, generator=gen).prev_sample
    ours = ddpm_sample(model, Schedule.linear(), sz, keep='last', generator=torch.Generator().manual_seed(seed))[-1]
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=0)

@pytest.mark.parametrize('seed', [0, 1])
def test_a_whole_run_with_the_cosine_schedule_is_that_of_diffusers(seed):
    sz,gen = (2,1,16,16),torch.Generator().manual_seed(seed)
    model,ref = Wavy().double(),DDPMScheduler(1000, beta_schedule='squaredcos_cap_v2', variance_type='fixed_large', clip_sample=True)
    ref.alphas_cumprod = ref.alphas_cumprod.double() # of the last steps 32 bits keep too little
    x = torch.randn(sz, generator=gen, dtype=torch.float64)
    with torch.no_grad():
        for t in ref.timesteps: x = ref.step(model(x, t.expand(sz[0])), t, x, generator=gen).prev_sample
    sched = Schedule(1-ref.alphas_cumprod/F.pad(ref.alphas_cumprod[:-1], (1, 0), value=1.)) # from the same numbers
    ours = ddpm_sample(model, sched, sz, keep='last', generator=torch.Generator().manual_seed(seed))[-1]
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(sched.β, Schedule.cosine(dtype=torch.float64).β, atol=1e-4, rtol=0)

def test_one_step_back_is_that_of_diffusers():
    ref,sched,x0 = reference(),Schedule.linear(),torch.randn(3,1,8,8)
    model = Wavy()
    steps = ddpm_steps(model, sched, x0.shape, generator=torch.Generator().manual_seed(5))
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(x0.shape, generator=gen)
    with torch.no_grad(): res = ref.step(model(x, torch.full((3,), 999)), 999, x, generator=gen)
    t,ours,x̂_0 = next(steps)
    torch.testing.assert_close(ours, res.prev_sample, atol=1e-5, rtol=0)
    torch.testing.assert_close(x̂_0, res.pred_original_sample, atol=1e-5, rtol=0)
    assert t == 999

def test_the_callback_takes_another_schedule():
    sched = Schedule.cosine(50)
    cb = DDPMCB(sched=sched)
    x_t,t,ε = batch_of(cb, torch.rand(64,1,4,4)*2-1)
    assert cb.n_steps == 50 and t.max() < 50 and cb.sched is sched
    assert len(cb.sample(Wavy(), (1,1,4,4))) == 50

def test_memory_does_not_grow_with_the_steps_where_only_the_last_is_kept():
    import gc
    class Counts(Wavy):
        def forward(self, x, t):
            if t[0] in (390, 10): held.append(sum(type(o) is torch.Tensor and o.shape == (2,1,7,9) for o in gc.get_objects()))
            return super().forward(x, t)
    for keep,grows in (('last', False), ('all', True)):
        held = []
        ddpm_sample(Counts(), Schedule.linear(400), (2,1,7,9), keep=keep)
        early,late = held
        assert (late-early > 300) if grows else late-early <= 2, held

def test_exact_noise_samples_the_data():
    "The pixels' distribution is N(m, s²), the exact ε is known in closed form, so samples have to have that mean and spread"
    m,s,sched = .3,.2,Schedule.linear()
    class Exact(nn.Module):
        def forward(self, x, t):
            ᾱ = sched.ᾱ[t].view(-1,1,1,1)
            return (1-ᾱ).sqrt()*(x - ᾱ.sqrt()*m)/(ᾱ*s**2 + 1-ᾱ)
    x = ddpm_sample(Exact(), sched, (64,1,16,16), keep='last', clip=False, generator=torch.Generator().manual_seed(0))[-1]
    n = x.numel()
    assert abs(x.mean()-m) < 4*s/math.sqrt(n)
    assert abs(x.std()-s) < 4*s/math.sqrt(2*n) + .01*s # and one percent for the thousand discrete steps

def test_t_is_uniform_for_every_item_and_noise_is_fresh():
    torch.manual_seed(0)
    cb,x0 = DDPMCB(n_steps=20),torch.zeros(50,1,2,2)
    draws = [batch_of(cb, x0) for _ in range(400)]
    t = torch.stack([o[1] for o in draws])
    counts = torch.stack([t[:,i].bincount(minlength=20) for i in range(50)]).double()
    chi2 = ((counts-20)**2/20).sum()                 # 50 items of 19 degrees of freedom
    assert abs(chi2-950) < 5*math.sqrt(2*950)
    assert not torch.equal(draws[0][2], draws[1][2])

def test_posterior_weights_go_where_they_should():
    c0,ct = posterior_coefs(Schedule.linear(dtype=torch.float64))
    assert c0[0] == pytest.approx(1) and ct[0] == 0 and c0[-1] < .001 and ct[-1] > .98

@pytest.mark.parametrize('bad,message', [
    (dict(n_steps=0), 'at least one step'), (dict(beta_min=0.), 'between 0 and 1'), (dict(beta_max=1.), 'between 0 and 1'),
    (dict(beta_min=.1, beta_max=.01), 'must not be above'), (dict(beta_min=math.nan), 'must not be above'),
    (dict(beta_max=math.inf), 'between 0 and 1')])
def test_bad_schedules(bad, message):
    with pytest.raises(ValueError, match=message): DDPMCB(**bad)

@pytest.mark.parametrize('x', [torch.zeros(4,1,8,8, dtype=torch.uint8), torch.zeros(4, 64), torch.zeros(4, 8, 8)])
def test_batches_that_are_not_images(x):
    with pytest.raises(ValueError, match='needs images in floating point'): batch_of(DDPMCB(), x)

def test_sampling_restores_mode_and_grad_also_when_it_is_given_up():
    model = nn.Sequential(nn.Identity()); model.forward = lambda x,t: x*0
    model.train()
    for i,(t,x,x0) in enumerate(ddpm_steps(model, Schedule.linear(10), (1,1,2,2))):
        assert not model.training and torch.is_grad_enabled()
        if i == 3: break
    import gc; gc.collect()
    assert model.training

def test_sampling_leaves_parts_that_were_frozen_in_evaluation():
    class Net(Wavy):
        def __init__(self): super().__init__(); self.norm = nn.BatchNorm2d(1)
    model = Net()
    model.norm.eval()
    ddpm_sample(model, Schedule.linear(3), (1,1,4,4))
    assert model.training and not model.norm.training

@pytest.mark.parametrize('keep,n', [('all', 20), ('last', 1), (5, 4), (20, 1)])
def test_keep(keep, n):
    got = ddpm_sample(Wavy(), Schedule.linear(20), (1,1,4,4), keep=keep, generator=torch.Generator().manual_seed(0))
    every = ddpm_sample(Wavy(), Schedule.linear(20), (1,1,4,4), generator=torch.Generator().manual_seed(0))
    assert len(got) == n and torch.equal(got[-1], every[-1])

@pytest.mark.parametrize('keep', [0, -1, 'first', 1.5, None])
def test_bad_keep(keep):
    with pytest.raises(ValueError, match='keep must be'): ddpm_sample(Wavy(), Schedule.linear(2), (1,1,4,4), keep=keep)

def test_plain_tensors_and_diffusers_outputs_are_both_understood():
    class Out(nn.Module):
        def forward(self, x, t): return type('Output', (), dict(sample=x*0))()
    x0 = torch.zeros(2,1,4,4)
    learn = Learner(Out(), DataLoaders([], [(x0, x0)]), F.mse_loss, cbs=DDPMCB(), opt_func=None)
    learn.fit(1, train=False)
    assert not learn.preds.any() and isinstance(DDPMCB(), TrainCB)
    assert len(DDPMCB(n_steps=3).sample(Out(), (2,1,4,4))) == 3

def test_space_to_depth_is_a_detour_without_loss():
    x = torch.randn(2, 3, 8, 8)
    class Shape(nn.Module):
        def forward(self, x, t): assert x.shape == (2, 12, 4, 4); return x
    assert torch.equal(SpaceToDepth(Shape())(x, None), x)
    with pytest.raises(ValueError, match='multiples of 2, not 7×8'): SpaceToDepth(Shape())(torch.zeros(1,1,7,8), None)

def test_pictures(tmp_path):
    from PIL import Image
    frames = [torch.rand(6,1,4,4)*2-1 for _ in range(3)]
    assert to_grid(frames[0], nrow=3, scale=2).shape == (22, 32, 3)
    gif = Image.open(save_gif(tmp_path/'a.gif', frames, nrow=3, scale=2))
    assert gif.n_frames == 3 and gif.size == (32, 22) and gif.info['loop'] == 0

def test_bad_sizes_and_models_that_change_the_shape():
    with pytest.raises(ValueError, match=r'sz must be \(n, channels, h, w\)'): ddpm_sample(Wavy(), Schedule.linear(2), (1,8,8))
    class Flat(nn.Module):
        def forward(self, x, t): return x.mean((1,2,3), keepdim=True)
    with pytest.raises(ValueError, match='the model returned shape'): ddpm_sample(Flat(), Schedule.linear(2), (2,1,4,4))

def test_pure_noise_is_that_of_the_generator_and_fits_the_model():
    model,gen = Wavy().double(),torch.Generator()
    x = pure_noise(model, (2,1,4,4), gen.manual_seed(3))
    assert torch.equal(x, torch.randn(2, 1, 4, 4, generator=gen.manual_seed(3), dtype=torch.float64))
    torch.manual_seed(3)
    assert torch.equal(pure_noise(nn.Identity(), (2,1,4,4)), torch.randn(2, 1, 4, 4, generator=gen.manual_seed(3)))
    with pytest.raises(ValueError, match='sz must be'): pure_noise(model, (2,4,4))

def test_the_model_is_asked_at_the_step_of_all():
    x = torch.randn(3, 1, 4, 4)
    with torch.no_grad(): assert torch.equal(predict_noise(Wavy(), x, 700), Wavy()(x, torch.tensor([700]*3)))

def unet(**kw):
    n = len(kw.get('block_out_channels', (8, 8)))
    return UNet2DModel(**dict(in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                              down_block_types=('DownBlock2D',)*n, up_block_types=('UpBlock2D',)*n) | kw)

def test_sizes_are_read_off_the_network():
    assert sizes_taken(unet()) == (1, 2) and sizes_taken(unet(block_out_channels=(8, 8, 8), in_channels=3)) == (3, 4)
    assert sizes_taken(unet(block_out_channels=(8,))) == (1, 1)
    assert sizes_taken(Wavy()) == (None, 1) and SpaceToDepth(Wavy(), 3).takes == (None, 3)
    assert SpaceToDepth(unet(in_channels=8, out_channels=8)).takes == (2, 4)
    check_sizes(torch.zeros(2,5,7,9), None, None, 1) # nothing is known

@pytest.mark.parametrize('sz, message', [
    ((2,1,14,15), 'multiples of 2, not 14×15'), ((2,3,8,8), 'of 1 channel, not 3: build it with in_channels=3'),
    ((2,1,1,1), 'multiples of 2, not 1×1')])
def test_sizes_that_the_network_cannot_take_are_named(sz, message):
    x = torch.zeros(sz)
    learn = Learner(unet(), DataLoaders([(x, x)], [(x, x)]), F.mse_loss, cbs=DDPMCB())
    for f in (learn.fit, lambda: ddpm_sample(learn.model, Schedule.linear(2), sz)):
        with pytest.raises(ValueError, match=message): f()

def test_what_cannot_be_folded():
    with pytest.raises(ValueError, match='takes 1 channels, but blocks of 2×2 pixels become 4'): SpaceToDepth(unet())
    with pytest.raises(ValueError, match='r must be at least 1'): SpaceToDepth(Wavy(), 0)
    for bad in (None, UNet2DModel):
        with pytest.raises(TypeError, match='unet must be a network'): SpaceToDepth(bad)
    net = SpaceToDepth(unet(in_channels=4, out_channels=4))
    with pytest.raises(TypeError, match='t is missing'): net(torch.zeros(2,1,8,8))
    with pytest.raises(ValueError, match='each of the 2 images, not shape'): net(torch.zeros(2,1,8,8), torch.zeros(3))
    for t in (3, torch.tensor(3), torch.tensor([3]), torch.tensor([3, 3])): assert net(torch.zeros(2,1,8,8), t).shape == (2,1,8,8)

@pytest.mark.parametrize('x', [
    torch.rand(4,1,8,8)*255, (torch.rand(4,1,8,8)*255).round(), torch.rand(4,3,8,8)*65535, torch.rand(4,1,8,8)*255-127])
def test_images_that_no_noise_hides(x):
    learn = Learner(Wavy(), DataLoaders([(x, x)], [(x, x)]), F.mse_loss, cbs=DDPMCB())
    for _ in range(2):
        with pytest.raises(ValueError, match='which noise of variance 1 cannot hide'): learn.fit(1)

@pytest.mark.parametrize('x', [torch.rand(4,1,8,8), torch.rand(4,1,8,8)-.5, torch.rand(4,1,8,8)*2-1, (torch.rand(4,1,8,8)-.28)/.1,
                               torch.randn(4,2,1,1)*5, torch.zeros(4,1,8,8), torch.ones(4,1,8,8), torch.rand(4,1,8,8).double()*20])
def test_images_that_noise_hides(x): assert batch_of(DDPMCB(), x)[0].shape == x.shape

def test_images_that_are_not_finite():
    x = torch.zeros(2,1,4,4)
    x[1,0,0,0] = math.nan
    with pytest.raises(ValueError, match='not finite numbers'): batch_of(DDPMCB(), x)

def test_the_pixels_are_looked_at_once_a_fit(monkeypatch):
    import miniai.schedule as s
    looks,real = [],s._check_pixels
    monkeypatch.setattr(s, '_check_pixels', lambda *a: (looks.append(a), real(*a)))
    x = torch.zeros(2,1,4,4)
    learn = Learner(Wavy(), DataLoaders([(x, x)]*5, [(x, x)]*2), F.mse_loss, cbs=DDPMCB())
    learn.fit(3)
    assert len(looks) == 1
    learn.fit(1)
    assert len(looks) == 2

@pytest.mark.parametrize('bad, message', [
    (dict(n_steps=Schedule.linear(3)), 'passed as sched='), (dict(n_steps=2.5), 'n_steps must be a whole number, not 2.5'),
    (dict(sched=torch.linspace(.1, .2, 5)), 'needs a Schedule, .* not a Tensor'),
    (dict(sched=10), 'not 10'), (dict(sched=Schedule), 'not the class Schedule')])
def test_what_is_no_schedule(bad, message):
    with pytest.raises(TypeError, match=message): DDPMCB(**bad)

def test_numbers_of_numpy_are_numbers():
    import numpy as np
    assert len(DDPMCB(np.int64(3), np.float32(.1), np.float64(.2)).sched) == 3

@pytest.mark.parametrize('kw, error, message', [
    (dict(model=None), TypeError, 'model must be an nn.Module.*NoneType'),
    (dict(model=Wavy), TypeError, 'not Wavy itself: call it'),
    (dict(model=lambda x,t: x), TypeError, 'itself'), (dict(sched=None), TypeError, 'needs a Schedule'),
    (dict(sched=Schedule.linear(2).ᾱ), TypeError, 'not a Tensor'), (dict(sz=16), ValueError, 'sz must be'),
    (dict(sz=(1,1,8.,8)), TypeError, 'h of sz must be a whole number'),
    (dict(sz=(1,0,8,8)), ValueError, 'channels of sz must be at least 1'),
    (dict(generator=0), TypeError, 'generator must be a torch.Generator, not 0')])
def test_what_cannot_be_sampled_with(kw, error, message):
    for f in (ddpm_sample, lambda **k: next(ddpm_steps(**k))):
        with pytest.raises(error, match=message): f(**dict(model=Wavy(), sched=Schedule.linear(2), sz=(1,1,8,8)) | kw)

def test_coefficients_need_a_schedule():
    with pytest.raises(TypeError, match='posterior_coefs needs a Schedule.*not None'): posterior_coefs(None)

def test_models_that_answer_with_a_tuple():
    class Two(Wavy):
        def forward(self, x, t): return x,x
    with pytest.raises(ValueError, match='the model returned a tuple'): ddpm_sample(Two(), Schedule.linear(2), (1,1,4,4))

@pytest.mark.parametrize('kw, error, message', [
    (dict(nrow=0), ValueError, 'nrow must be at least 1'), (dict(nrow=-1), ValueError, 'nrow'),
    (dict(scale=0), ValueError, 'scale must be'),
    (dict(scale=1.5), TypeError, 'scale must be a whole number'), (dict(x=torch.zeros(0,1,4,4)), ValueError, 'images must be at least 1'),
    (dict(x=torch.zeros(2,1,4,4, dtype=torch.uint8)), ValueError, 'floating point'),
    (dict(x=torch.zeros(4,4)), ValueError, 'to_grid needs images')])
def test_bad_grids(kw, error, message):
    with pytest.raises(error, match=message): to_grid(**dict(x=torch.zeros(2,1,4,4)) | kw)

@pytest.mark.parametrize('kw, message', [(dict(ms=-5), 'ms is how long'), (dict(ms=0), 'ms is how long'), (dict(frames=[]), 'no frames'),
                                         (dict(path='x'), 'must end in .gif'), (dict(path='x.png'), 'must end in .gif')])
def test_bad_animations(tmp_path, kw, message):
    kw = dict(path='x.gif', frames=[torch.zeros(1,1,4,4)]) | kw
    with pytest.raises(ValueError, match=message): save_gif(tmp_path/kw.pop('path'), **kw)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('exc', [KeyboardInterrupt, OSError])
def test_an_animation_is_there_whole_or_not_at_all(tmp_path, monkeypatch, exc):
    from PIL import Image
    frames,real = [torch.rand(2,1,4,4) for _ in range(3)],Image.Image.save
    before = save_gif(tmp_path/'a.gif', frames).read_bytes()
    def breaks(self, path, *args, **kwargs):
        real(self, path, *args, **kwargs)
        raise exc
    monkeypatch.setattr(Image.Image, 'save', breaks)
    for name in ('a.gif', 'b.gif'):
        with pytest.raises(exc): save_gif(tmp_path/name, frames[:1])
    assert [o.name for o in tmp_path.iterdir()] == ['a.gif'] and (tmp_path/'a.gif').read_bytes() == before

@pytest.mark.parametrize('form', [lambda x: x, lambda x: (x,), lambda x: dict(image=x, label=x[:,0,0,0]), lambda x: [x, x]])
def test_batches_of_any_form(form):
    x = torch.rand(4,1,8,8)
    learn = Learner(Wavy(), DataLoaders([form(x)]*3, [form(x)]), F.mse_loss, lr=.1, cbs=DDPMCB())
    learn.fit(1)
    assert learn.batch[1].shape == learn.preds.shape == x.shape

def test_the_learning_rate_finder_draws_the_noise_task():
    import matplotlib.pyplot as plt
    x,cb = torch.rand(16,1,8,8)*2-1,DDPMCB(n_steps=50)
    net,dls = SpaceToDepth(unet(in_channels=4, out_channels=4)),DataLoaders([x]*8, [x])
    learn = Learner(net, dls, F.mse_loss, cbs=cb, opt_func=torch.optim.Adam)
    learn.fit(1)
    before = [p.clone() for p in learn.model.parameters()]
    learn.lr_find()
    losses = plt.gca().lines[0].get_ydata()
    assert len(losses) > 10 and losses[0] == pytest.approx(learn.loss.item(), abs=.4) # about 1, the variance of the noise
    assert all(torch.equal(p, q) for p,q in zip(before, learn.model.parameters())) and learn.cbs == [cb]
