"The plain loop against the Learner, accuracy against torchmetrics, and budgets"
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn, optim
from torchmetrics.functional import accuracy as their_accuracy

from helpers import HandSGD, weights
from miniai.datasets import DataLoaders
from miniai.learner import TrainLearner
from miniai.training import Dataset, accuracy, budget, budget_name, fit, get_dls, out_dir, report

@pytest.mark.parametrize('n,classes', [(1, 2), (7, 3), (64, 10)])
def test_accuracy_is_that_of_torchmetrics(n, classes):
    torch.manual_seed(n)
    out,y = torch.randn(n, classes),torch.randint(0, classes, (n,))
    assert accuracy(out, y).item() == pytest.approx(their_accuracy(out, y, 'multiclass', num_classes=classes).item())

def test_accuracy_of_classes_at_each_place_of_an_image():
    out,y = torch.randn(2, 3, 4, 5),torch.randint(3, (2, 4, 5))
    assert accuracy(out, y) == (out.argmax(1) == y).float().mean()

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_among_equal_scores_the_first_counts(dtype):
    out = torch.tensor([[1, 1, 1], [0, 2, 2], [5, 5, 0]]).to(dtype)
    assert accuracy(out, torch.tensor([0, 1, 0])) == 1 and accuracy(out, torch.tensor([2, 2, 1])) == 0

def test_a_row_with_nan_is_wrong():
    "Its largest score would be the NaN"
    nan,inf = float('nan'),float('inf')
    assert accuracy(torch.full((4, 3), nan), torch.zeros(4)) == 0
    assert accuracy(torch.tensor([[1, nan, 0], [nan, 0, 0], [0, inf, 0], [-inf, 0, 1]]), torch.tensor([1, 0, 1, 2])) == .5

@pytest.mark.parametrize('out,y,error,message', [
    (torch.randn(8, 3), torch.zeros(8, 1), ValueError, r'not targets of shape \(8, 1\): squeeze\(1\)'),
    (torch.randn(3, 3), torch.eye(3), ValueError, r'not targets of shape \(3, 3\): .*argmax\(1\) undoes one-hot'),
    (torch.randn(8, 3), torch.zeros(7), ValueError, r'each row of out \(8, 3\), not targets of shape \(7,\)'),
    (torch.randn(8, 3), torch.tensor(0), ValueError, 'not targets of shape'),
    (torch.randn(8, 1), torch.zeros(8), ValueError, r'several classes, not out of shape \(8, 1\)'), # it would always guess 0
    (torch.randn(8), torch.zeros(8), ValueError, r'several classes, not out of shape \(8,\)'),
    (torch.randn(8, 3, 2), torch.zeros(8), ValueError, 'not targets'),
    (torch.randn(4, 3), [0, 1, 2, 0], TypeError, 'takes tensors, not list: torch.as_tensor'),
    (np.zeros((4, 3)), np.zeros(4), TypeError, 'takes tensors'), ((torch.randn(4, 3),), torch.zeros(4), TypeError, 'takes tensors')])
def test_targets_of_another_shape(out, y, error, message):
    for f in (accuracy, lambda out, y: report(torch.tensor(1.), out, y)):
        with pytest.raises(error, match=message): f(out, y)

def test_accuracy_does_not_wait_for_the_device():
    "Tensors without contents can be asked for nothing but their shapes"
    assert accuracy(torch.zeros(4, 3, device='meta'), torch.zeros(4, device='meta')).shape == ()

def test_report_prints_loss_and_accuracy(capsys):
    report(torch.tensor(1.234), torch.eye(4)[:3], torch.tensor([0, 1, 3]))
    assert capsys.readouterr().out == '1.23, 0.67\n'

def batches(*sizes):
    gen = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 4, generator=gen), torch.randint(0, 3, (n,), generator=gen)) for n in sizes]

def test_the_plain_loop_and_the_learner_end_with_the_same_weights(capsys):
    train,valid = batches(8, 8, 3),batches(16, 5)
    torch.manual_seed(0); plain = nn.Linear(4, 3)
    torch.manual_seed(0); learn = TrainLearner(nn.Linear(4, 3), DataLoaders(train, valid), F.cross_entropy, lr=.1)
    loss,acc = fit(2, plain, F.cross_entropy, optim.SGD(plain.parameters(), lr=.1), train, valid)
    learn.fit(2)
    assert torch.equal(weights(plain), weights(learn.model))
    x,y = map(torch.cat, zip(*valid))
    with torch.no_grad(): preds = plain(x)
    assert loss == pytest.approx(F.cross_entropy(preds, y).item(), rel=1e-5) and acc == pytest.approx(accuracy(preds, y).item())
    assert len(capsys.readouterr().out.splitlines()) == 2

def test_a_loop_without_validation_data_says_so():
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match='valid_dl gave no batch'):
        fit(1, model, F.cross_entropy, optim.SGD(model.parameters(), lr=.1), batches(8), [])

def test_a_homemade_optimizer_trains_the_same():
    ends = []
    for make in (HandSGD, optim.SGD):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        fit(2, model, F.cross_entropy, make(model.parameters(), lr=.1), batches(8, 8, 3), batches(5))
        ends.append(weights(model))
    torch.testing.assert_close(*ends)

def model_and(opt): return (m := nn.Linear(4, 3)),opt(m.parameters(), lr=.1)

@pytest.mark.parametrize('kwargs,error,message', [
    (dict(opt=None), TypeError, 'opt needs step and zero_grad, which None does not have'),
    (dict(opt=optim.SGD), TypeError, "opt needs step and zero_grad, which <class 'torch.optim.sgd.SGD'>"),
    (dict(opt=F.cross_entropy), TypeError, 'opt needs step'), (dict(epochs=0), ValueError, 'at least one epoch, not 0'),
    (dict(train_dl=[]), ValueError, 'train_dl gave no batch'), (dict(valid_dl=[]), ValueError, 'valid_dl gave no batch'),
    (dict(train_dl=iter(batches(8, 8))), TypeError, r'train_dl gives its batches once, not each epoch: take list\(train_dl\)'),
    (dict(valid_dl=(b for b in batches(8))), TypeError, 'valid_dl gives its batches once')])
def test_wrong_calls_of_fit_train_nothing(kwargs, error, message):
    model,opt = model_and(optim.SGD)
    before = weights(model).clone()
    given = dict(epochs=2, model=model, loss_func=F.cross_entropy, opt=opt, train_dl=batches(8, 8), valid_dl=batches(5))
    with pytest.raises(error, match=message): fit(**{**given, **kwargs})
    assert torch.equal(weights(model), before)

def test_one_epoch_may_be_of_a_generator(capsys):
    model,opt = model_and(optim.SGD)
    fit(1, model, F.cross_entropy, opt, (b for b in batches(8, 8)), iter(batches(5)))
    assert capsys.readouterr().out.startswith('0 ')

def test_a_dataset_pairs_what_is_of_equal_length():
    ds = Dataset(torch.arange(10), torch.arange(10)*2)
    assert len(ds) == 10 and ds[3] == (3, 6)
    train,valid = get_dls(ds, ds, 4)
    assert [len(x) for x,_ in valid] == [8, 2] and sorted(torch.cat([x for x,_ in train]).tolist()) == list(range(10))
    with pytest.raises(ValueError, match='3 inputs but 2 targets'): Dataset([1, 2, 3], [1, 2])

@pytest.mark.parametrize('x,y,message', [(3, 4, 'x needs __len__ and __getitem__, which 3'), ([1], None, 'y needs .* None'),
                                         (zip([1], [2]), [1], 'x needs'), ([1], list, 'y needs')])
def test_a_dataset_needs_sequences(x, y, message):
    with pytest.raises(TypeError, match=message): Dataset(x, y)

@pytest.mark.parametrize('name', ['full', 'cpu', 'quick'])
def test_a_budget_can_be_named(monkeypatch, name):
    monkeypatch.setenv('MINIAI_BUDGET', name)
    assert budget_name() == name == budget(full='full', cpu='cpu', quick='quick')

def test_the_budget_is_quick_under_test_and_else_the_devices(monkeypatch):
    monkeypatch.delenv('MINIAI_BUDGET', raising=False)
    monkeypatch.setenv('IN_TEST', '1')
    assert budget_name() == 'quick'
    monkeypatch.delenv('IN_TEST')
    for there,name in ((True, 'full'), (False, 'cpu')):
        monkeypatch.setattr(torch.accelerator, 'is_available', lambda: there)
        assert budget_name() == name
    monkeypatch.setenv('MINIAI_BUDGET', 'fast')
    with pytest.raises(ValueError, match="'fast', expected 'full', 'cpu' or 'quick'"): budget_name()

def test_files_go_where_miniai_out_says(monkeypatch, tmp_path):
    monkeypatch.setenv('MINIAI_OUT', str(tmp_path/'a'/'b'))
    assert out_dir() == tmp_path/'a'/'b' and out_dir().is_dir()
    monkeypatch.delenv('MINIAI_OUT')
    monkeypatch.setenv('IN_TEST', '1')
    assert out_dir() != out_dir(), 'under test, each call has a folder of its own'
    monkeypatch.delenv('IN_TEST')
    monkeypatch.chdir(tmp_path)
    assert out_dir().resolve() == tmp_path/'_run'
