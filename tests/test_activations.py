"Hooks, the statistics that they gather, and the seed"
import random

import numpy as np, pytest, torch
from helpers import RaiseCB, weights
from torch import nn

from miniai.activations import ActivationStats, Hook, Hooks, HooksCallback, append_stats, get_hist, get_min, set_seed
from miniai.datasets import DataLoaders
from miniai.learner import TrainLearner

def n_hooks(model): return sum(len(m._forward_hooks) for m in model.modules())
def count(hook, mod, inp, outp): hook.n = getattr(hook, 'n', 0)+1

@pytest.mark.parametrize('seed', [0, 1, 2**32, 2**40])
def test_a_seed_sets_all_three(seed):
    def draw(seed):
        set_seed(seed)
        return random.random(),np.random.rand(),torch.rand(1).item()
    assert draw(seed) == draw(seed)
    assert all(a != b for a,b in zip(draw(seed), draw(seed+1)))

def test_deterministic_lasts_until_the_next_seed():
    set_seed(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    set_seed(0)
    assert not torch.are_deterministic_algorithms_enabled()

@pytest.mark.parametrize('which,left', [(0, 4), (-1, 4), (slice(1, 4), 2), (slice(None, None, 2), 2), (slice(None), 0)], ids=str)
def test_deleted_hooks_are_removed(which, left):
    model = nn.Sequential(*[nn.Identity() for _ in range(5)])
    with Hooks(model, count) as hooks:
        del hooks[which]
        model(torch.ones(1))
        assert len(hooks) == n_hooks(model) == left and all(h.n == 1 for h in hooks)
    assert n_hooks(model) == 0

@pytest.mark.parametrize('event', 'before_fit before_epoch before_batch after_predict after_step cleanup_batch after_fit'.split())
def test_hooks_leave_with_a_fit_that_fails(model, dls, event):
    cb = HooksCallback(count)
    with pytest.raises(OSError): TrainLearner(model, dls, cbs=[cb, RaiseCB(event, OSError())]).fit(1)
    assert n_hooks(model) == 0 and len(cb) == 1
    TrainLearner(model, dls, cbs=cb).fit(1)
    assert n_hooks(model) == 0 and cb.hooks[0].n == 11 # and the next fit counts anew

def test_hooks_are_those_of_the_model_that_the_fit_has(model, dls):
    learn = TrainLearner(model, dls, cbs=(cb := HooksCallback(count, lambda m: isinstance(m, nn.Linear))))
    for model,names in ((model, ['Linear']), (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), ['Linear 0', 'Linear 1'])):
        learn.model = model
        learn.fit(1)
        assert [h.name for h in cb] == names and [h.n for h in cb] == [11]*len(names)

def test_one_callback_that_can_be_iterated_over_is_still_one(model, dls):
    stats = ActivationStats()
    TrainLearner(model, dls, cbs=stats).fit(1)
    assert len(stats.hooks[0].stats[0]) == 11
    learn = TrainLearner(model, dls)
    learn.fit(1, cbs=(again := ActivationStats()))
    assert len(again) == 1 and learn.cbs == []

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_statistics_are_numpys(dtype):
    set_seed(0)
    x = (torch.randn(20, 30)*6).to(dtype)
    with Hook(nn.Identity(), append_stats) as h: pass
    append_stats(h, None, None, dict(pair=(None, x)))
    a = x.float().numpy()
    hist = np.histogram(np.abs(a).clip(max=10), 40, (0, 10))[0]
    assert hist[-1] > 20 and h.stats[2][0].tolist() == hist.tolist()
    np.testing.assert_allclose([h.stats[0][0], h.stats[1][0]], [a.mean(), a.std(ddof=1)], rtol=1e-4)
    np.testing.assert_allclose(get_hist(h)[:,0], np.log1p(hist), rtol=1e-5)
    assert get_min(h).item() == pytest.approx((np.abs(a) < .25).mean())

def test_a_module_that_is_called_twice_leaves_two_entries(dls):
    twice = nn.Linear(4, 4)
    TrainLearner(nn.Sequential(twice, twice), DataLoaders([(x, x) for x,_ in dls.train], []),
                 cbs=(stats := ActivationStats(lambda m: m is twice))).fit(1, valid=False)
    assert [len(s) for s in stats.hooks[0].stats] == [22]*3

def test_watching_does_not_change_the_fit(dls):
    def trained(*cbs):
        set_seed(0)
        learn = TrainLearner(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), dls, cbs=cbs)
        learn.fit(2)
        return weights(learn.model)
    assert torch.equal(trained(ActivationStats()), trained())
