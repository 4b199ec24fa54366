"Schedules against those of diffusers, and noising"
import math

import pytest, torch
from diffusers import DDPMScheduler

from miniai import ddpm
from miniai.schedule import Schedule, add_noise, check_images, check_sched, extract

def test_schedule_is_that_of_diffusers():
    s,ref = Schedule.linear(1000, 0.0001, 0.02),DDPMScheduler(1000, 0.0001, 0.02)
    for ours,theirs in [(s.β, ref.betas), (s.α, ref.alphas), (s.ᾱ, ref.alphas_cumprod), (s.σ, ref.betas.sqrt())]:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)

@pytest.mark.parametrize('n_steps', [1, 10, 1000])
def test_cosine_schedule_is_that_of_diffusers(n_steps):
    s,ref = Schedule.cosine(n_steps),DDPMScheduler(n_steps, beta_schedule='squaredcos_cap_v2')
    for ours,theirs in [(s.β, ref.betas), (s.α, ref.alphas), (s.ᾱ, ref.alphas_cumprod)]:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert len(s) == n_steps and s.β.max() <= .999

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('sched', [Schedule.linear(), Schedule.cosine(50)], ids=['linear', 'cosine'])
def test_noised_images_are_those_of_diffusers(sched, dtype):
    torch.manual_seed(0)
    x0,ε = torch.randn(2, 5, 3, 8, 8, dtype=dtype)
    t = torch.tensor([0, 1, 9, 30, len(sched)-1])
    ref = DDPMScheduler(trained_betas=sched.β.numpy())
    ours = add_noise(x0, ε, extract(sched.ᾱ, t, x0))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, ref.add_noise(x0, ε, t), atol=1e-5, rtol=1e-5)
    for i,s in enumerate(t): torch.testing.assert_close(add_noise(x0[i], ε[i], sched.ᾱ[s]), ours[i], atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_of_steps_are_like_the_images(dtype):
    v = extract(Schedule.linear().ᾱ, torch.tensor([5, 700]), torch.zeros(2, 3, 4, 4, dtype=dtype))
    assert v.shape == (2, 1, 1, 1) and v.dtype == dtype

def test_it_moves_once():
    s = Schedule.linear(5)
    assert s.to('cpu') is s and s.to('meta').ᾱ.device.type == 'meta' and len(s.to('meta')) == 5

def test_the_name_is_where_it_was(): assert ddpm.Schedule is Schedule and 'Schedule' in ddpm.__all__

@pytest.mark.parametrize('bad,message', [
    (dict(n_steps=0), 'at least one step'), (dict(s=-.1), 'from 0 on'), (dict(s=math.nan), 'from 0 on'),
    (dict(s=math.inf), 'from 0 on'), (dict(beta_max=1.), 'between 0 and 1'), (dict(beta_max=0.), 'between 0 and 1')])
def test_bad_cosine_schedules(bad, message):
    with pytest.raises(ValueError, match=message): Schedule.cosine(**bad)

@pytest.mark.parametrize('β', [torch.zeros(0), torch.rand(2,2), torch.tensor([.1, math.nan]), torch.tensor([.1, 1.])])
def test_bad_β(β):
    with pytest.raises(ValueError, match='β'): Schedule(β)

@pytest.mark.parametrize('x', [torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, 64), torch.zeros(4, 8, 8)])
def test_what_are_no_images(x):
    with pytest.raises(ValueError, match=r'Somebody needs images in floating point, \(n, channels, h, w\)'): check_images(x, 'Somebody')

@pytest.mark.parametrize('make', [lambda: Schedule.linear(5000, beta_max=.9), lambda: Schedule(torch.full((200,), .9)),
                                  lambda: Schedule.linear(1000, beta_max=.5, dtype=torch.float32)])
def test_a_schedule_that_leaves_nothing(make):
    with pytest.raises(ValueError, match='falls to exactly 0 at step .* fewer steps or smaller β'): make()

def test_a_schedule_that_leaves_next_to_nothing():
    assert Schedule.linear(1000, beta_max=.1).ᾱ[-1] > 0 and Schedule.cosine(4000).ᾱ[-1] > 0
    assert Schedule.linear(1000, beta_max=.9, dtype=torch.float64).ᾱ[-1] > 0

@pytest.mark.parametrize('n', [1.5, '3', None, Schedule, torch.tensor(1.5).numpy()])
def test_what_is_no_number_of_steps(n):
    for f in (Schedule.linear, Schedule.cosine):
        with pytest.raises(TypeError, match='n_steps must be a whole number'): f(n)

@pytest.mark.parametrize('β', [[.1, .2], None, .1])
def test_β_that_is_no_tensor(β):
    with pytest.raises(TypeError, match='β must be a tensor'): Schedule(β)

def test_checks():
    s = Schedule.linear(3)
    assert check_sched(s, 'this') is s
    with pytest.raises(TypeError, match="this needs a Schedule, such as .*, not 'x'"): check_sched('x', 'this')
    with pytest.raises(ValueError, match='Somebody needs images in floating point.*not None'): check_images(None, 'Somebody')
    with pytest.raises(IndexError, match='t has step 9, but there are only 3'): extract(s.ᾱ, torch.tensor([1, 9]), torch.zeros(2,1,2,2))
