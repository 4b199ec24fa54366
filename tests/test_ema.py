"Averaged weights: what is averaged, when the model has them, and that its own come back"
import pytest, torch
from torch import nn

from miniai.conv import unwrap_model
from miniai.datasets import DataLoaders
from miniai.ema import EMACB
from miniai.learner import Callback, CancelEpochException, Learner, TrainCB

def own(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

class Look(Callback):
    "The weights that each epoch has"
    order = EMACB.order+1
    def before_fit(self, learn): self.seen = []
    def before_epoch(self, learn): self.seen.append((learn.training, own(learn.model)))

def test_averages_copy_the_statistics_of_batchnorm(dls):
    model,ema = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)),EMACB(.5)
    Learner(model, dls, cbs=[TrainCB(), ema]).fit(2)
    for k in ('1.running_mean', '1.running_var', '1.num_batches_tracked'): assert torch.equal(ema.avg[k], model.state_dict()[k])
    assert not torch.equal(ema.avg['0.weight'], model[0].weight)

@pytest.mark.parametrize('warmup', [True, False])
def test_averages_are_those_of_the_formula(dls, model, warmup):
    class Keep(Callback):
        def after_step(self, learn): ws.append(own(learn.model))
    ws,ema = [own(model)],EMACB(.8, warmup)
    Learner(model, DataLoaders(dls.train*3, []), lr=.01, cbs=[TrainCB(), ema, Keep()]).fit(2, valid=False)
    a = ws[0]
    for n,w in enumerate(ws[1:], 1):
        d = min(.8, (1+n)/(10+n)) if warmup else .8
        a = d*a + (1-d)*w
    with ema.averaged(model): torch.testing.assert_close(own(model), a)
    assert ema.n == len(ws)-1 == 66

def test_evaluation_has_the_averages_and_training_the_weights(dls, model):
    ema,look = EMACB(.9),Look()
    learn = Learner(model, dls, lr=.01, cbs=[TrainCB(), ema, look])
    learn.fit(2)
    after,avg = own(model),torch.cat([ema.avg[k].flatten() for k in dict(model.named_parameters())])
    assert [t for t,_ in look.seen] == [True, False]*2
    assert torch.equal(look.seen[-1][1], avg) and not torch.equal(after, avg)
    learn.fit(1, train=False) # a fit that only evaluates keeps them
    assert torch.equal(look.seen[0][1], avg) and torch.equal(own(model), after)
    learn.fit(1, valid=False) # one that trains begins anew
    assert torch.equal(look.seen[0][1], after) and ema.n == len(dls.train)

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelEpochException])
def test_the_model_has_its_own_weights_again_after_an_error_in_evaluation(dls, model, error):
    class Trip(Callback):
        def after_predict(self, learn):
            if not learn.training:
                tripped.append(own(learn.model))
                raise error
    tripped,ema = [],EMACB(.9)
    learn = Learner(model, dls, lr=.01, cbs=[TrainCB(), ema])
    learn.fit(1, valid=False)
    before = own(model)
    try: learn.fit(1, train=False, cbs=Trip())
    except (RuntimeError, KeyboardInterrupt): assert error is not CancelEpochException
    assert torch.equal(own(model), before) and not torch.equal(tripped[0], before)

def test_averages_of_a_compiled_model_are_the_models(dls, model):
    compiled,ema = torch.compile(model, backend='eager'),EMACB(.9)
    Learner(compiled, dls, cbs=[TrainCB(), ema]).fit(1, valid=False)
    assert ema.avg.keys() == model.state_dict().keys()
    weights = own(model)
    for m in (model, compiled):
        with ema.averaged(m): assert not torch.equal(own(model), weights)
        assert torch.equal(own(unwrap_model(m)), weights)

def test_what_is_refused(model):
    ema = EMACB()
    for bad in (-.1, 1., 2.):
        with pytest.raises(ValueError, match='from 0 to below 1'): EMACB(bad)
    with pytest.raises(ValueError, match='no averages yet'):
        with ema.averaged(model): pass
    Learner(model, DataLoaders([(torch.randn(3, 4), torch.randn(3, 1))], []), cbs=[TrainCB(), ema]).fit(1, valid=False)
    with pytest.raises(ValueError, match='another model'):
        with ema.averaged(nn.Linear(4, 2)): pass
