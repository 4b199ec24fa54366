"The plain loop against the Learner, accuracy against torchmetrics, and budgets"
import pytest, torch
import torch.nn.functional as F
from torch import nn, optim
from torchmetrics.functional import accuracy as their_accuracy

from helpers import weights
from miniai.datasets import DataLoaders
from miniai.learner import TrainLearner
from miniai.training import Dataset, accuracy, budget, budget_name, fit, get_dls, out_dir, report

@pytest.mark.parametrize('n,classes', [(1, 2), (7, 3), (64, 10)])
def test_accuracy_is_that_of_torchmetrics(n, classes):
    torch.manual_seed(n)
    out,y = torch.randn(n, classes),torch.randint(0, classes, (n,))
    assert accuracy(out, y).item() == pytest.approx(their_accuracy(out, y, 'multiclass', num_classes=classes).item())

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

def test_a_dataset_pairs_what_is_of_equal_length():
    ds = Dataset(torch.arange(10), torch.arange(10)*2)
    assert len(ds) == 10 and ds[3] == (3, 6)
    train,valid = get_dls(ds, ds, 4)
    assert [len(x) for x,_ in valid] == [8, 2] and sorted(torch.cat([x for x,_ in train]).tolist()) == list(range(10))
    with pytest.raises(ValueError, match='3 inputs but 2 targets'): Dataset([1, 2, 3], [1, 2])

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
