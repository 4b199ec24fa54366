"Test-time dropout: who is woken and who sleeps on, and every formula against another way to compute it"
import math, warnings

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

import miniai.augment # noqa: F401 (it gives learners capture_preds)
from miniai.activations import set_seed
from miniai.datasets import DataLoaders, TensorLoader
from miniai.dropout import Dropout, Dropout2d
from miniai.learner import Callback, CancelEpochException, DeviceCB, Learner, MetricsCB, TrainCB
from miniai.uncertainty import MCDropoutCB, PassStats, TTD_CB, entropy, fit_temperature, mc_predict, reliability, risk_coverage

KINDS = [Dropout, Dropout2d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]

def learner(model, n=40, **kw):
    x,y = torch.randn(n, 6),torch.arange(n) % 3
    dls = DataLoaders(TensorLoader(x, y, bs=16), TensorLoader(x, y, bs=16))
    return Learner(model, dls, F.cross_entropy, cbs=[TrainCB(), DeviceCB('cpu')], **kw)

def net(p=.5):
    deep = nn.Sequential(nn.Sequential(Dropout(p)))
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), deep, nn.Linear(20, 3), nn.Dropout(p))

class Watch(Callback):
    "Who is in training mode, batch by batch"
    def before_fit(self, learn): self.seen = []
    def before_batch(self, learn): self.seen.append((learn.training, [type(m) for m in learn.model.modules() if m.training]))

@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_is_woken_however_deep_and_sleeps_again(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer,self.norm = nn.Linear(6, 3),nn.BatchNorm1d(3)
            self.deep = nn.ModuleList([nn.ModuleDict({'a': nn.Sequential(kind())})]) # never called, but it is there
        def forward(self, x): return self.norm(self.layer(x))
    model,watch = Net(),Watch()
    learner(model).capture_preds(cbs=[MCDropoutCB(), watch])
    assert len(watch.seen) == 3 and all(not training and who == [kind] for training,who in watch.seen)
    assert all(m.training for m in model.modules()), 'as it was before'

def test_only_evaluation_is_changed_and_modes_are_kept():
    model,watch = net(),Watch()
    learn = learner(model)
    learn.fit(1, cbs=[TTD_CB(), watch])
    in_training,in_eval = ([who for t,who in watch.seen if t is training] for training in (True, False))
    assert all(len(who) == len(list(model.modules())) for who in in_training) and all(who == [Dropout, nn.Dropout] for who in in_eval)
    assert not any(m.training for m in model.modules()) # as after any fit that ends with evaluation
    model.train()
    mc_predict(learn, 2)
    assert all(m.training for m in model.modules()), 'capture_preds puts modes back'

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelEpochException])
@pytest.mark.parametrize('event', ['before_epoch', 'after_predict', 'after_epoch'])
def test_state_is_restored_after_an_error(error, event):
    class Trip(Callback):
        order = 5
    def trip(self, learn): raise error
    setattr(Trip, event, trip)
    model = net()
    learn = learner(model)
    try: learn.fit(1, train=False, cbs=[TTD_CB(), Trip()])
    except (RuntimeError, KeyboardInterrupt): assert error is not CancelEpochException
    assert not any(m.training for m in model.modules())
    a,b = (learn.capture_preds()[0] for _ in range(2))
    assert torch.equal(a, b)

def test_batchnorm_and_weights_stay():
    model = net()
    learn = learner(model)
    learn.fit(1)
    before = {k: v.clone() for k,v in model.state_dict().items()}
    mc_predict(learn, 3)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())

def test_a_model_named_after_dropout_is_not_trained():
    class DropoutNet(nn.Sequential): pass
    model = DropoutNet(*net())
    weight = model[0].weight.clone()
    stats,_ = mc_predict(learner(model), 4)
    assert torch.equal(weight, model[0].weight) and stats.mutual_info.sum() > 0

def test_warns_where_nothing_would_happen():
    for model in (nn.Linear(6, 3), net(0.)):
        with pytest.warns(UserWarning, match='no effect'): mc_predict(learner(model), 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        mc_predict(learner(net()), 1)

def test_mean_of_passes_is_evaluation_for_a_linear_network():
    set_seed(0)
    model = nn.Sequential(Dropout(.5), nn.Linear(6, 3))
    learn = learner(model)
    exact,_ = learn.capture_preds()
    passes = torch.stack([learn.capture_preds(cbs=TTD_CB())[0] for _ in range(400)])
    assert ((passes.mean(0)-exact).abs() < 6*passes.std(0)/20 + 1e-6).all()

@pytest.mark.parametrize('T,n,classes', [(1, 5, 2), (7, 30, 10), (50, 3, 4)])
def test_statistics_pass_by_pass_are_those_of_all_passes(T, n, classes):
    set_seed(T)
    passes = (torch.randn(T, n, classes)*3).softmax(2)
    stats = PassStats()
    for p in passes: stats.update(p)
    all_ = passes.double()
    H = -(all_*all_.log()).sum(2)
    mean = all_.mean(0)
    torch.testing.assert_close(stats.probs, mean)
    torch.testing.assert_close(stats.entropy, -(mean*mean.log()).sum(1))
    torch.testing.assert_close(stats.mutual_info, stats.entropy - H.mean(0), atol=1e-10, rtol=0)
    kl = (all_*(all_.log()-mean.log())).sum(2).mean(0) # mutual information is also the mean divergence from the mean
    torch.testing.assert_close(stats.mutual_info, kl, atol=1e-7, rtol=0)
    votes = [max((all_[:,i].argmax(1) == c).sum().item() for c in range(classes)) for i in range(n)]
    torch.testing.assert_close(stats.variation_ratio, 1-torch.tensor(votes).double()/T)
    assert (stats.mutual_info <= stats.entropy).all() and (stats.entropy <= math.log(classes)+1e-9).all()

def test_memory_does_not_grow_with_passes():
    def held(n):
        stats = PassStats()
        for _ in range(n): stats.update(torch.rand(20, 3).softmax(1))
        return sum(v.numel() for v in vars(stats).values() if isinstance(v, torch.Tensor))
    assert held(1) == held(50) == 20*(3+3+1)

def test_certain_and_impossible():
    one_hot = torch.eye(4)
    stats = PassStats()
    for _ in range(3): stats.update(one_hot)
    for v in (stats.entropy, stats.mutual_info, stats.variation_ratio): assert not v.any()
    assert torch.equal(entropy(torch.tensor([0., 1.])), torch.tensor(0.))
    for bad in (torch.randn(3, 2), torch.tensor([[.5, .6]]), torch.tensor([[torch.nan, 1.]]), torch.tensor([[-.5, 1.5]])):
        with pytest.raises(ValueError, match='softmax'): PassStats().update(bad)
    for name in ('probs', 'confidence', 'entropy', 'mutual_info', 'variation_ratio'):
        with pytest.raises(ValueError, match='no pass'): getattr(PassStats(), name)

@pytest.mark.parametrize('n_bins', [1, 2, 15, 40])
def test_reliability_gives_the_calibration_error_of_torchmetrics(n_bins):
    set_seed(n_bins)
    probs,targs = (torch.randn(500, 6)*2).softmax(1),torch.randint(0, 6, (500,))
    conf,acc,share = reliability(probs, targs, n_bins)
    ours = ((conf-acc).abs()*share).nansum()
    torch.testing.assert_close(ours, multiclass_calibration_error(probs, targs, 6, n_bins=n_bins, norm='l1'), atol=1e-5, rtol=0)
    torch.testing.assert_close(share.sum(), torch.tensor(1.))
    assert (acc.isnan() == (share == 0)).all()
    with pytest.raises(ValueError): reliability(probs[:0], targs[:0])

@pytest.mark.parametrize('T', [.5, 1., 2., 4.])
def test_temperature_is_found_and_is_the_best(T):
    set_seed(0)
    true = torch.randn(20_000, 5)*2
    targs = torch.distributions.Categorical(logits=true).sample()
    found = fit_temperature(true*T, targs)
    assert abs(found/T-1) < .05
    best = F.cross_entropy(true*T/found, targs)
    for near in (.97, 1.03): assert F.cross_entropy(true*T/(found*near), targs) > best
    assert torch.equal((true*T/found).argmax(1), (true*T).argmax(1))

def test_temperature_refuses_what_has_none():
    scores,targs = torch.eye(3)*4,torch.arange(3)
    with pytest.raises(ValueError, match='all answers are right'): fit_temperature(scores, targs)
    with pytest.raises(ValueError, match='no better than chance'): fit_temperature(scores, (targs+1) % 3)
    with pytest.raises(ValueError, match='finite'): fit_temperature(scores*torch.nan, targs)
    for s,t in ((scores, targs[:2]), (scores[0], targs), (scores[:0], targs[:0]), (scores[:,:1], targs), (scores, targs[:,None])):
        with pytest.raises(ValueError, match='rows of scores|expected scores'): fit_temperature(s, t)

def test_risk_and_coverage():
    set_seed(0)
    wrong = torch.rand(1000) < .2
    coverage,risk = risk_coverage(wrong.float(), wrong) # knows exactly what is wrong
    assert not risk[:(~wrong).sum()].any() and risk[-1] == wrong.float().mean() and coverage[-1] == 1
    _,blind = risk_coverage(torch.rand(1000), wrong)
    assert abs(blind[499]-wrong.float().mean()) < .1 and blind[-1] == risk[-1]
    for s,w in ((torch.zeros(2), wrong), (torch.zeros(2, 2), torch.zeros(2, 2)), (torch.zeros(0), torch.zeros(0))):
        with pytest.raises(ValueError, match='a score for each'): risk_coverage(s, w)

def test_mc_predict_with_transforms_and_kept_passes():
    set_seed(0)
    learn = learner(net())
    stats,targs,passes = mc_predict(learn, 5, keep=True)
    assert passes.shape == (5, 40, 3) and stats.n_passes == 5 and torch.equal(targs, torch.arange(40) % 3)
    assert passes.std(0).max() > 0
    from miniai.init import BatchTransformCB
    zeros,_ = mc_predict(learn, 2, cbs=BatchTransformCB(lambda b: (b[0]*0, b[1])))
    assert (zeros.probs.std(0) > 0).any() # each row has coins of its own
    with pytest.raises(ValueError, match='at least 1'): mc_predict(learn, 0)

# what a careful person gets wrong

def test_entropy_is_of_distributions():
    for bad in (torch.tensor([-1., 2.]), torch.tensor([.2, .2]), torch.tensor([torch.nan, 1.]), torch.randn(3, 4), torch.ones(2, 0)):
        with pytest.raises(ValueError, match='use softmax'): entropy(bad)
    with pytest.raises(ValueError, match='not one number'): entropy(torch.tensor(1.))
    assert entropy(np.array([.5, .5])).item() == pytest.approx(math.log(2)) and entropy([1, 0]) == 0
    p = torch.tensor([.25, .75], requires_grad=True)
    entropy(p).backward()
    assert p.grad is not None # it can be part of a loss

def test_passes_are_given_as_probabilities():
    stats = PassStats()
    stats.update(np.array([[.5, .5]]))
    stats.update([[1., 0.]])
    assert stats.probs.tolist() == [[.75, .25]]
    for bad in (None, 'x', [['a']]):
        with pytest.raises(TypeError, match='tensor of probabilities'): stats.update(bad)

@pytest.mark.parametrize('end', [nn.Softmax(1), nn.Sequential(nn.Dropout(.5), nn.Softmax(1))], ids=['softmax', 'dropout before it'])
def test_a_model_that_ends_in_a_softmax_is_refused(end):
    "Softmax of probabilities is nearly even: all answers would look uncertain, without a word"
    with pytest.raises(ValueError, match='probabilities already'): mc_predict(learner(nn.Sequential(Dropout(.1), nn.Linear(6, 3), end)), 2)
    with pytest.raises(ValueError, match='probabilities already'): fit_temperature(torch.rand(9, 3).softmax(1), torch.arange(9) % 3)

def test_scores_that_no_softmax_can_be_taken_of():
    for model,what in ((nn.Sequential(Dropout(.5), nn.Linear(6, 1)), '2 or more classes'), (Tuple(), 'tensor of scores'),
                       (nn.Sequential(Dropout(.5), nn.Linear(6, 3), Times(torch.inf)), 'not all finite')):
        learn = learner(model)
        learn.loss_func = lambda *args: torch.zeros(())
        with pytest.raises((ValueError, TypeError), match=what): mc_predict(learn, 2)

class Times(nn.Module):
    def __init__(self, k): super().__init__(); self.k = k
    def forward(self, x): return x*self.k
class Tuple(nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x): return self.net(x),x

def test_log_probabilities_are_scores():
    stats,_ = mc_predict(learner(nn.Sequential(Dropout(.5), nn.Linear(6, 3), nn.LogSoftmax(1))), 2)
    assert stats.n_passes == 2

@pytest.mark.parametrize('bad', [0, -1, 2.5, 'x', None])
def test_a_number_of_passes_is_a_whole_one(bad):
    with pytest.raises((ValueError, TypeError), match='n_passes must be'): mc_predict(learner(net()), bad)

def test_targets_are_classes():
    probs,scores = torch.tensor([[.9, .1], [.2, .8], [.6, .4]]),torch.tensor([[2., 0], [0, 2], [1, 0]])
    for targs in ([0, 1, 9], [0, 1, -1], [0, 1, .5], [[0, 1, 1]], [[0], [1], [1]]):
        for f,o in ((reliability, probs), (fit_temperature, scores)):
            with pytest.raises(ValueError, match='target'): f(o, torch.tensor(targs))
    with pytest.raises(ValueError, match='one of 2 classes'): reliability(probs, torch.full((3,), -100))
    with pytest.raises(ValueError, match='n_bins must be'): reliability(probs, [0, 1, 1], n_bins=0)

def test_rows_without_a_target_are_left_out_as_cross_entropy_does():
    set_seed(0)
    scores,targs = torch.randn(300, 3)*3,torch.randint(0, 3, (300,))
    scores[range(300),targs] += 2
    some = torch.arange(300) % 5 > 0
    holes = torch.where(some, targs, -100)
    assert fit_temperature(scores, holes) == pytest.approx(fit_temperature(scores[some], targs[some]))
    for a,b in zip(reliability(scores.softmax(1), holes), reliability(scores.softmax(1)[some], targs[some])):
        torch.testing.assert_close(a, b, equal_nan=True)

def test_arrays_do_as_well_as_tensors():
    set_seed(0)
    scores,targs = torch.randn(50, 3),torch.randint(0, 3, (50,))
    scores[range(50),targs] += 1
    assert fit_temperature(scores.numpy(), targs.numpy()) == pytest.approx(fit_temperature(scores, targs), rel=1e-4)
    for f,args in ((reliability, (scores.softmax(1), targs)), (risk_coverage, (scores[:,0], targs > 0))):
        for a,b in zip(f(*args), f(*(o.numpy() for o in args))): torch.testing.assert_close(a, b, equal_nan=True)

def test_an_answer_is_wrong_or_right_and_a_score_can_be_ranked():
    score = torch.tensor([.3, .1, .2])
    _,risk = risk_coverage(score, torch.tensor([1., 0., 1.]))
    assert risk.tolist() == pytest.approx([0, 1/2, 2/3]) and risk_coverage(score, np.array([True, False, True]))[1].equal(risk)
    for wrong in ([0, 1, 2], [.5, 1, 0], [-1, 1, 1], [math.nan, 0, 0]):
        with pytest.raises(ValueError, match='whether it is wrong'): risk_coverage(score, torch.tensor(wrong))
    with pytest.raises(ValueError, match='NaN'): risk_coverage(torch.tensor([.1, torch.nan, .2]), torch.zeros(3).bool())
    assert risk_coverage(torch.tensor([torch.inf, 0.]), torch.tensor([True, False]))[1].tolist() == [0, .5]

# batches of other kinds, wrapped models, and a fit that goes on

@pytest.mark.parametrize('kind', ['two inputs', 'two targets', 'dict of targets', 'dict', 'no target'])
def test_mc_predict_of_batches_of_any_kind(kind):
    x,y = torch.randn(5, 6),torch.arange(5) % 3
    b = {'two inputs': (x, x, y), 'two targets': (x, y, y+1), 'dict of targets': (x, dict(a=y, b=y+1)), 'dict': dict(x=x, y=y),
         'no target': x}[kind]
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x, x2=None): return self.net(x)
    learn = Learner(Two(), DataLoaders([], [b]*3), lambda p,*t: p.mean(), cbs=TrainCB(n_inp=2 if kind == 'two inputs' else 1))
    stats,targs = mc_predict(learn, 3)
    assert stats.probs.shape == (15, 3) and stats.n_passes == 3
    if kind == 'two targets': assert [len(t) for t in targs] == [15, 15]
    if kind == 'dict of targets': assert targs['b'].equal((y+1).repeat(3))

def test_the_order_of_targets_in_a_dict_is_looked_at():
    class Shuffled:
        def __iter__(self):
            x,y = torch.randn(40, 6),torch.randperm(40)
            yield x,dict(a=y)
    learn = Learner(net(), DataLoaders([], Shuffled()), lambda p,*t: p.mean(), cbs=TrainCB())
    with pytest.raises(ValueError, match='do not shuffle'): mc_predict(learn, 2)

@pytest.mark.parametrize('event', ['after_epoch', 'after_batch', 'before_epoch'])
def test_mc_predict_within_a_fit_leaves_the_fit_as_it_was(event):
    class Ask(Callback):
        def __init__(self): self.said = []
        def ask(self, learn):
            if learn.epoch == 1 and not self.said: self.said.append(mc_predict(learn, 2)[0].n_passes)
    setattr(Ask, event, Ask.ask)
    class Look(Callback):
        order = 50
        def __init__(self): self.lrs,self.modes = [],[]
        def after_batch(self, learn):
            self.lrs.append(learn.opt.param_groups[0]['lr'])
            self.modes.append([m.training for m in learn.model.modules()])
    def fit(*cbs):
        set_seed(0)
        learn = learner(net(), lr=.05)
        learn.fit(2, cbs=[look := Look(), *cbs])
        return look
    plain,look = fit(),fit(ask := Ask())
    assert ask.said == [2] and look.lrs == plain.lrs and look.modes == plain.modes

def wrap(model, kind):
    if kind == 'compiled': return torch.compile(model, backend='eager')
    class Outer(nn.parallel.DistributedDataParallel): # without a group of processes
        def __init__(self, m): nn.Module.__init__(self); self.module = m
        def forward(self, *args): return self.module(*args)
    return Outer(model) if kind == 'ddp' else torch.compile(Outer(model), backend='eager')

@pytest.mark.parametrize('kind', ['compiled', 'ddp', 'both'])
def test_dropout_of_wrapped_models_is_woken(kind):
    class DropoutNet(nn.Sequential): pass
    model = DropoutNet(*net())
    learn,watch = learner(wrap(model, kind)),Watch()
    stats,_ = mc_predict(learn, 4, cbs=watch)
    assert stats.mutual_info.max() > 0 and not model[1].num_batches_tracked
    assert all(who == [Dropout, nn.Dropout] for _,who in watch.seen) and all(m.training for m in model.modules())

def test_a_learner_with_metrics_and_dropout_awake_keeps_both():
    learn = learner(net())
    learn.cbs += [metrics := MetricsCB(), ttd := TTD_CB()]
    metrics._log = lambda d: None
    learn.fit(1)
    total = metrics.loss.compute().item()
    mc_predict(learn, 2)
    assert metrics.loss.compute().item() == total and ttd.woken == ()
