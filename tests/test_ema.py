"Averaged weights: a model of their own, what it holds, when it is evaluated, and that the learner's model is back whatever happens"
import copy, gc, weakref
from functools import partial

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import miniai.ema
from helpers import lines_run
from miniai.accel import AccelerateCB, GradAccumCB
from miniai.activations import HooksCallback
from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders, TensorLoader
from miniai.ema import EMACB
from miniai.learner import Callback, CancelEpochException, DeviceCB, Learner, TrainCB
from miniai.uncertainty import TTD_CB, mc_predict

def own(model): return torch.cat([p.detach().flatten() for p in model.parameters()])
def fit(model, dls, *cbs, n=2, lr=.01, valid=False): Learner(model, dls, lr=lr, cbs=[TrainCB(), *cbs]).fit(n, valid=valid)
def held(model): return {k: o.clone() for k,o in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class Look(Callback):
    "The model and the weights that each epoch has"
    order = EMACB.order+1
    def before_fit(self, learn): self.seen = []
    def before_epoch(self, learn): self.seen.append((learn.training, learn.model, own(learn.model)))

def test_averages_copy_the_statistics_of_batchnorm(dls):
    class During(Callback):
        def after_step(self, learn): assert not ema.model.training
        order = EMACB.order+1
        def after_batch(self, learn): assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    model,ema = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)),EMACB(.5)
    fit(model, dls, ema, During(), GradAccumCB(4), valid=True)
    for k in ('running_mean', 'running_var', 'num_batches_tracked'): assert torch.equal(getattr(ema.model[1], k), getattr(model[1], k))
    assert not torch.equal(ema.model[0].weight, model[0].weight) and same(ema.avg, held(ema.model))
    now = held(ema.model)
    fit(model, dls) # without averages
    assert same(now, held(ema.model)), 'its buffers are its own'

@pytest.mark.parametrize('warmup', [True, False])
def test_averages_are_those_of_the_formula(dls, model, warmup):
    class Keep(Callback):
        def after_step(self, learn): ws.append(own(learn.model))
    ws,ema = [own(model)],EMACB(.8, warmup)
    fit(model, DataLoaders(dls.train*3, []), ema, Keep())
    a = ws[0]
    for n,w in enumerate(ws[1:], 1):
        d = min(.8, (1+n)/(10+n)) if warmup else .8
        a = d*a + (1-d)*w
    torch.testing.assert_close(own(ema.model), a)
    assert ema.n == len(ws)-1 == 66 and not ema.model.training
    assert torch.equal(own(model), ws[-1])

def test_evaluation_has_the_averages_and_training_the_weights(dls, model):
    ema,look = EMACB(.9),Look()
    learn = Learner(model, dls, lr=.01, cbs=[TrainCB(), ema, look])
    learn.fit(2)
    first,after,avg = ema.model,own(model),own(ema.model)
    assert [t for t,*_ in look.seen] == [True, False]*2 and learn.model is model
    assert torch.equal(look.seen[-1][2], avg) and not torch.equal(after, avg)
    learn.fit(1, train=False) # a fit that only evaluates keeps them
    assert look.seen[0][1] is first is ema.model and torch.equal(own(model), after) and torch.equal(own(first), avg)
    learn.fit(1, valid=False) # one that trains begins anew
    assert torch.equal(look.seen[0][2], after) and ema.n == len(dls.train)
    assert ema.model is not first and torch.equal(own(first), avg), 'what was held from before stays as it was'

def test_another_model_is_evaluated_itself(dls, model):
    "There are no averages of it"
    ema,look = EMACB(.9),Look()
    fit(model, dls, ema)
    other = nn.Linear(4, 1)
    learn = Learner(other, dls, cbs=[TrainCB(), ema, look])
    learn.fit(1, train=False)
    assert look.seen[0][1] is learn.model is other

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelEpochException])
def test_the_learner_has_its_model_again_after_an_error_in_evaluation(dls, model, error):
    class Trip(Callback):
        def after_predict(self, learn):
            if not learn.training:
                tripped.append(learn.model)
                raise error
    tripped,ema = [],EMACB(.9)
    learn = Learner(model, dls, lr=.01, cbs=[TrainCB(), ema])
    learn.fit(1, valid=False)
    before = own(model)
    try: learn.fit(1, train=False, cbs=Trip())
    except (RuntimeError, KeyboardInterrupt): assert error is not CancelEpochException
    assert learn.model is model and torch.equal(own(model), before) and tripped == [ema.model]

lines = partial(lines_run, miniai.ema)

def test_an_interruption_anywhere_leaves_no_mixture(dls):
    "Whichever line it comes before, the learner has its model, whose weights are those of its own training"
    class Keep(Callback):
        order = EMACB.order-1
        def after_step(self, learn): ws.append(own(learn.model))
    few = DataLoaders(dls.train[:2], dls.valid[:1])
    def run():
        nonlocal learn,ws,ema
        torch.manual_seed(0)
        ema,model = EMACB(.9),nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        ws,learn = [own(model)],Learner(model, few, lr=.01, cbs=[TrainCB(), ema, Keep()])
        learn.was = model
        learn.fit(1)
    learn = ws = ema = None
    n = lines(run)
    assert n > 50
    for i in range(n):
        with pytest.raises(KeyboardInterrupt): lines(run, i)
        assert learn.model is learn.was and torch.equal(own(learn.model), ws[-1])
        learn.fit(1)
        assert learn.model is learn.was and ema.n == 2

def test_two_averages_leave_the_learner_its_model(dls, model):
    fast,slow,look = EMACB(.5),EMACB(.99),Look()
    learn = Learner(model, dls, lr=.01, cbs=[TrainCB(), fast, slow, look])
    learn.fit(2)
    learn.fit(1, train=False)
    assert learn.model is model and look.seen[0][1] is slow.model # the last one's are evaluated
    alone = EMACB(.5)
    torch.manual_seed(1)
    fit(nn.Linear(4, 1), dls, alone)
    assert torch.equal(own(fast.model), own(alone.model)) and not torch.equal(own(fast.model), own(slow.model))

def test_averages_of_a_compiled_model_are_the_models(dls, model):
    compiled,ema,look = torch.compile(model, backend='eager'),EMACB(.9),Look()
    learn = Learner(compiled, dls, lr=.01, cbs=[TrainCB(), ema, look])
    learn.fit(1)
    assert learn.model is compiled and ema.model.state_dict().keys() == model.state_dict().keys() and look.seen[-1][1] is ema.model
    for m in (model, compiled): # the averages are those of what is inside
        learn.model = m
        learn.fit(1, train=False)
        assert look.seen[0][1] is ema.model and learn.model is m

def test_a_model_with_a_compiled_part(dls):
    model = nn.Sequential(torch.compile(nn.Linear(4, 3), backend='eager'), nn.Linear(3, 1))
    ema,x = EMACB(.9),dls.valid[0][0]
    fit(model, dls, ema, n=3, valid=True)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    for p,o in zip(plain.parameters(), ema.model.parameters(), strict=True): p.data = o.data
    torch.testing.assert_close(ema.model(x), plain(x))
    assert not torch.allclose(ema.model(x), model(x))

@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_averages_beside_accelerate_do_not_compute_with_the_models_weights(dls, model, precision):
    "It patches `forward` on the instance"
    class During(Callback):
        order = EMACB.order+1
        def after_predict(self, learn):
            if learn.training: return
            seen.append(learn.model)
            assert torch.equal(learn.preds, F.linear(learn.batch[0], ema.model.weight, ema.model.bias))
    seen,ema,x = [],EMACB(.9),dls.valid[0][0]
    learn = Learner(model, dls, lr=.05, cbs=[AccelerateCB(mixed_precision=precision), ema, During()])
    for n in (2, 1): # a second fit finds what the first one left on the model
        learn.fit(n)
        plain = nn.Linear(4, 1)
        plain.load_state_dict(ema.model.state_dict())
        assert torch.equal(ema.model(x), plain(x)) and not torch.allclose(ema.model(x), model(x))
        assert learn.model is model and set(seen) == {ema.model}
        learn.fit(1, train=False)
        seen.clear()

def test_hooks_are_shared_not_copied(dls, model):
    "They hold the learner and with it all data"
    class NoCopy:
        def __deepcopy__(self, memo): raise AssertionError('the data were copied')
    mods = []
    hooks = HooksCallback(lambda hook, mod, inp, outp: mods.append(mod), on_valid=True)
    learn = Learner(model, DataLoaders(dls.train[:2], dls.valid[:1]), lr=.01, cbs=[TrainCB(), ema := EMACB(.9), hooks])
    learn.extra = NoCopy()
    learn.fit(1)
    assert mods == [model, model, ema.model]
    learn.fit(1, train=False)
    assert mods[3:] == [ema.model]
    assert not model._forward_hooks and not ema.model._forward_hooks

class Own(nn.Module):
    "Its hook is its own method, and it keeps what it computed, in a list too"
    def __init__(self):
        super().__init__()
        self.lin,self.add,self.kept = nn.Linear(4, 1),nn.Parameter(torch.zeros(1)),[]
        self.lin.register_forward_hook(self._shift)
    def _shift(self, mod, inp, outp): return outp + self.add
    def forward(self, x):
        self.last = self.lin(x)
        self.kept = [self.last]
        return self.last

def test_hooks_of_the_model_itself_and_what_it_keeps(dls):
    model,ema,x = Own(),EMACB(.9),dls.valid[0][0]
    model(x) # leaves a tensor with a history, which cannot be copied as such
    hooks = HooksCallback(lambda hook, mod, inp, outp: None)
    fit(model, dls, ema, hooks, n=3, lr=.1, valid=True)
    torch.testing.assert_close(ema.model(x), F.linear(x, ema.model.lin.weight, ema.model.lin.bias) + ema.model.add)
    assert not torch.allclose(ema.model.add, model.add)

def test_pruned_and_normed_layers(dls):
    "The older ones are hooks that set an attribute before each forward"
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 1))
    prune.random_unstructured(model[2], 'weight', .3)
    ema,x = EMACB(.9),dls.valid[0][0]
    model(x)
    fit(model, dls, ema, n=3, valid=True)
    before = ema.model(x)
    assert not torch.allclose(before, model(x))
    torch.testing.assert_close(ema.model(x), before)

def test_tied_weights_stay_tied(dls):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 1))
    model[2].weight = model[0].weight
    ema = EMACB(.9)
    fit(model, dls, ema, n=2)
    assert ema.model[2].weight is ema.model[0].weight and not torch.equal(ema.model[0].weight, model[0].weight)
    ema.load_state_dict(dict(n=3, weights={k: o+1 for k,o in ema.state_dict()['weights'].items()}))
    assert ema.n == 3 and ema.model[2].weight is ema.model[0].weight

class Odd(nn.Module):
    "Frozen and integer parameters, and buffers that grow, come and go"
    def __init__(self):
        super().__init__()
        self.lin,self.frozen = nn.Linear(4, 1),nn.Parameter(torch.randn(3), requires_grad=False)
        self.whole = nn.Parameter(torch.tensor([1, 2, 3]), requires_grad=False)
        self.register_buffer('seen', torch.zeros(0))
        self.register_buffer('later', None)
        self.register_buffer('first', torch.zeros(2), persistent=False)
    def forward(self, x):
        if self.training:
            self.seen = torch.cat([self.seen, x.detach().mean().view(1)])
            self.later,self.first = x.detach().sum().double(),None
        return self.lin(x)

def test_odd_parameters_and_buffers(dls):
    model,ema = Odd(),EMACB(.9)
    start = held(model)
    fit(model, dls, ema, valid=True)
    avg = ema.model
    for k in ('frozen', 'whole'): assert torch.equal(getattr(avg, k), start[k])
    assert len(avg.seen) == 22 and torch.equal(avg.seen, model.seen) and torch.equal(avg.later, model.later) and avg.first is None
    assert avg.whole.dtype == torch.int64 and not avg.frozen.requires_grad and avg.lin.weight.requires_grad
    state = copy.deepcopy(ema.state_dict())
    torch.nn.init.zeros_(avg.lin.weight)
    avg.seen = torch.zeros(3)
    ema.load_state_dict(state)
    assert same(ema.state_dict()['weights'], state['weights']) and len(avg.seen) == 22

def test_averages_go_to_the_device_of_the_fit_that_evaluates(dls, model):
    "There may be no other device here: double precision stands for it"
    ema,look = EMACB(.9),Look()
    learn = Learner(model, dls, lr=.01, cbs=[TrainCB(), ema, look])
    learn.fit(1)
    model.double()
    learn.dls = DataLoaders([], [(x.double(), y.double()) for x,y in dls.valid])
    learn.fit(1, train=False)
    assert look.seen[0][1] is ema.model and ema.model.weight.dtype == torch.float64

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a second device')
def test_averages_go_from_the_gpu_to_the_cpu_and_back(dls, model):
    model = nn.Sequential(model, nn.BatchNorm1d(1))
    ema = EMACB(.9)
    learn = Learner(model, dls, lr=.01, cbs=[TrainCB(), ema])
    learn.fit(1, cbs=DeviceCB('cuda'))
    for device in ('cpu', 'cuda'):
        learn.fit(1, train=False, cbs=DeviceCB(device))
        assert {o.device.type for o in ema.model.state_dict().values()} == {device}

def test_dropout_at_test_time_wakes_the_layers_of_the_averages(dls):
    model,ema,seen = nn.Sequential(nn.Linear(4, 8), nn.Dropout(.5), nn.Linear(8, 1)),EMACB(.9),[]
    class See(Callback):
        def after_predict(self, learn):
            if not learn.training: seen.append((learn.model is ema.model, learn.model.training, learn.model[1].training))
    learn = Learner(model, dls, lr=.01, cbs=[TrainCB(), ema, See()])
    learn.fit(1)
    assert set(seen) == {(True, False, False)}
    seen.clear()
    learn.fit(1, train=False, cbs=TTD_CB())
    assert set(seen) == {(True, False, True)} and not any(m.training for m in ema.model.modules())

def test_an_interrupted_fit_goes_on_with_its_averages(dls, tmp_path):
    "A checkpoint brings them back after the first training epoch began"
    class Stop(Callback):
        order = 200
        def after_batch(self, learn):
            if learn.training and learn.epoch == 1 and learn.iter == 4: raise KeyboardInterrupt
    def run(*cbs):
        torch.manual_seed(0)
        model,ema = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)),EMACB(.9)
        try: fit(model, dls, ema, *cbs, n=3, valid=True)
        except KeyboardInterrupt: pass
        return ema
    whole,cut = run(),run(CheckpointCB(tmp_path, every=2), Stop())
    resumed = run(CheckpointCB(tmp_path, every=2, resume=True))
    assert resumed.n == whole.n == 33 > cut.n
    assert same(held(resumed.model), held(whole.model))

def test_averages_can_be_copied_trained_and_saved(dls, model, tmp_path):
    ema = EMACB(.9)
    fit(model, dls, ema)
    avg,own_now = copy.deepcopy(ema.model),own(model)
    fit(ema.model, dls)
    assert not torch.equal(own(ema.model), own(avg)) and torch.equal(own(model), own_now)
    torch.save(ema.model, tmp_path/'m.pt')

def test_nothing_holds_the_learner_after_the_fit(dls, model):
    ema = EMACB(.9)
    learn = Learner(model, dls, lr=.01, cbs=[TrainCB(), ema, HooksCallback(lambda *args: None)])
    learn.fit(1)
    gone = weakref.ref(learn)
    del learn
    gc.collect()
    assert gone() is None and ema.model is not None

def test_what_is_refused(model):
    ema = EMACB()
    for bad in (-.1, 1., 2.):
        with pytest.raises(ValueError, match='from 0 to below 1'): EMACB(bad)
    with pytest.raises(ValueError, match='no averages yet: fit with this callback first'): ema.model
    with pytest.raises(ValueError, match='no averages yet'): ema.state_dict()
    Learner(model, DataLoaders([], [(torch.randn(3, 4), torch.randn(3, 1))]), cbs=[TrainCB(), ema]).fit(1, train=False)
    with pytest.raises(ValueError, match='no averages yet'): ema.model # evaluation alone makes none

def images():
    g = torch.Generator().manual_seed(0)
    x,y = torch.rand(40, 1, 8, 8, generator=g),torch.randint(10, (40,), generator=g)
    return DataLoaders(TensorLoader(x, y, bs=8), TensorLoader(x[:16], y[:16], bs=16))

@pytest.mark.parametrize('helper', [lambda o: o.show_image_batch(max_n=2), lambda o: o.lr_find(max_epochs=1), lambda o: o.capture_preds(),
                                    lambda o: o.summary(), lambda o: mc_predict(o, 2)], ids=['show', 'lr_find', 'capture', 'summary', 'mc'])
def test_a_look_with_a_helper_keeps_the_averages(helper):
    "Before, between and after fits, and within one"
    class Within(Callback):
        order = 50
        def ask(self, learn):
            now = held(ema.model)
            helper(learn)
            assert same(held(ema.model), now)
        after_step = after_epoch = ask
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout(.1))
    learn = Learner(net, images(), F.cross_entropy, lr=.1, cbs=[TrainCB(), ema := EMACB(.9)])
    helper(learn)
    with pytest.raises(ValueError, match='no averages yet'): ema.model # a helper's fit makes none here
    for cbs in (None, Within()):
        learn.fit(2, cbs=cbs)
        model,avg,raw = ema.model,held(ema.model),held(net)
        helper(learn)
        assert ema.model is model and same(held(model), avg) and ema.n == 10 and not model.training
        assert learn.model is net and own(net).equal(torch.cat([raw[k].flatten() for k,_ in net.named_parameters()]))

def test_a_helper_that_evaluates_uses_the_averages(dls, model):
    class Within(Callback):
        def after_epoch(self, learn):
            preds,_ = learn.capture_preds()
            torch.testing.assert_close(preds, averaged())
    def averaged(): return torch.cat([ema.model(x) for x,_ in dls.valid]).detach()
    learn = Learner(model, dls, lr=.05, cbs=[TrainCB(), ema := EMACB(.99), Within()])
    learn.fit(2)
    preds,_ = learn.capture_preds()
    torch.testing.assert_close(preds, averaged())
    assert not torch.allclose(preds, torch.cat([model(x) for x,_ in dls.valid]))

@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_averages_of_a_compiled_model_beside_accelerate(dls, model, precision):
    compiled,x = torch.compile(model, backend='eager'),dls.valid[0][0]
    learn = Learner(compiled, dls, lr=.05, cbs=[AccelerateCB(mixed_precision=precision), ema := EMACB(.9)])
    for _ in range(2):
        learn.fit(1)
        assert torch.equal(ema.model(x), F.linear(x, ema.model.weight, ema.model.bias)) and not torch.allclose(ema.model(x), model(x))
        assert learn.model is compiled and torch.allclose(compiled(x), F.linear(x, model.weight, model.bias))
