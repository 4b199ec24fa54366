"Dropout against PyTorch's, by its properties, for all shapes and types; the classifier, its files and where they are looked for"
import json, math
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from safetensors.torch import save_file
from torch import nn

import miniai.augment, miniai.dropout
from miniai.activations import set_seed
from miniai.datasets import drawn, fashion_mnist, in_memory, is_drawn
from miniai.dropout import Classifier, Dropout, Dropout2d, fit_classifier, load_classifier, save_classifier, trained_classifier
from miniai.training import accuracy

@pytest.mark.parametrize('ours,theirs,shape', [(Dropout, nn.Dropout, (50, 40)), (Dropout, nn.Dropout, (5, 20, 4, 5)),
                                               (Dropout2d, nn.Dropout2d, (40, 50, 3, 3))])
@pytest.mark.parametrize('p', [.05, .5, .9])
def test_moments_are_those_of_pytorch(ours, theirs, shape, p):
    set_seed(0)
    x = torch.ones(shape)
    a,b = ours(p)(x),theirs(p)(x)
    coins = math.prod(shape[:2]) if ours is Dropout2d else x.numel()
    se = math.sqrt(p/(1-p)/coins) # of the mean: each is 0 or 1/(1-p)
    assert abs(a.mean()-1) < 6*se and abs(b.mean()-1) < 6*se
    assert torch.equal(a.unique(), b.unique())

@pytest.mark.parametrize('cls', [Dropout, Dropout2d])
def test_edges(cls):
    x = torch.randn(4, 3, 5, 5)
    assert cls(0.)(x) is x and cls(.5).eval()(x) is x
    assert not cls(1.)(x).any() and cls(1.).eval()(x) is x
    for p in (-1e-9, 1+1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match='between 0 and 1'): cls(p)

@pytest.mark.parametrize('cls', [Dropout, Dropout2d])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_type_and_gradient(cls, dtype):
    x = (torch.rand(4, 30, 2, 2, dtype=dtype)+1).requires_grad_()
    y = cls(.5)(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert torch.equal(x.grad, 2*(y != 0).to(dtype))

def test_dropout2d_of_a_single_image_and_of_other_shapes():
    y = Dropout2d(.5)(torch.ones(200, 4, 6))
    assert torch.equal(y.amin((1,2)), y.amax((1,2))) and 0 < (y == 0).float().mean() < 1
    for shape in ((3,), (3, 4), (1, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match='takes'): Dropout2d()(torch.ones(shape))

def test_reproducible_and_new_each_time():
    x,drop = torch.ones(1000),Dropout(.5)
    set_seed(3); a,b = drop(x),drop(x)
    set_seed(3); assert torch.equal(a, drop(x)) and not torch.equal(a, b)

SMALL = dict(nfs=(4, 8, 16), drop=.2)

@pytest.fixture
def dd(): return {k: ds.select(range(60)) for k,ds in drawn(60, 60).items()}

def test_classifier_takes_images_of_other_sizes_and_counts_its_parameters():
    model = Classifier(**SMALL).eval()
    for size in (28, 32, 9): assert model(torch.rand(2, 1, size, size)).shape == (2, 10)
    assert sum(p.numel() for p in Classifier().parameters()) == 1_760_852
    assert type(model[:2]) is nn.Sequential and model[-1] is list(model)[-1]

def test_weights_are_the_same_for_a_seed_and_differ_between_seeds(dd):
    a,b,c = (fit_classifier(dd, seed, n_epochs=1, device='cpu', **SMALL).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a['0.convs.0.0.weight'], c['0.convs.0.0.weight'])

def test_a_classifier_from_its_files_is_the_same(tmp_path):
    set_seed(0)
    model = Classifier(**SMALL).to(memory_format=torch.channels_last)
    model(torch.rand(9, 1, 28, 28)) # statistics
    save_classifier(model, tmp_path/'a'/'b', seed=3, note='to be found again')
    again = load_classifier(tmp_path/'a'/'b')
    assert again.config == model.config == dict(nfs=[4, 8, 16], drop=.2, drop2d=0.) and not again.training
    for k,v in model.state_dict().items(): torch.testing.assert_close(again.state_dict()[k], v, rtol=1e-3, atol=1e-6)
    assert json.loads((tmp_path/'a'/'b'/'config.json').read_text())['about'] == dict(seed=3, note='to be found again')
    save_classifier(again, tmp_path/'second')
    second = load_classifier(tmp_path/'second').state_dict()
    assert all(torch.equal(v, second[k]) for k,v in again.state_dict().items()), 'nothing is lost a second time'

def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    save_classifier(Classifier(**SMALL), tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    def full(*args): raise OSError('no space left')
    monkeypatch.setattr(miniai.dropout, 'save_file', full)
    with pytest.raises(OSError): save_classifier(Classifier((4, 8)), tmp_path)
    assert before == {f.name: f.read_bytes() for f in tmp_path.iterdir()}

def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere has no config.json'): load_classifier(tmp_path/'nowhere')
    save_classifier(Classifier(**SMALL), tmp_path)
    weights = tmp_path/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match='model.safetensors'): load_classifier(tmp_path)
    save_classifier(Classifier((4, 8)), tmp_path/'other')
    weights.write_bytes((tmp_path/'other/model.safetensors').read_bytes())
    with pytest.raises(ValueError, match='model.safetensors'): load_classifier(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match='has no model.safetensors'): load_classifier(tmp_path)

def test_a_classifier_that_is_missing_is_trained_and_kept(tmp_path, monkeypatch, dd):
    calls = []
    def fit(dd, seed, n_epochs, device, cbs):
        calls.append(seed)
        return fit_classifier(dd, seed, 1, device=device, **SMALL)
    monkeypatch.setattr(miniai.dropout, 'fit_classifier', fit)
    monkeypatch.setattr(miniai.dropout, 'is_drawn', lambda dd: False)
    monkeypatch.setattr(miniai.dropout, 'fashion_mnist', lambda: dd)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    first,second = (trained_classifier(77, device='cpu') for _ in range(2))
    x = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(first(x), second(x), atol=.05, rtol=.05)
    assert calls == [77] and (tmp_path/'miniai/classifier-77/config.json').exists() and not second.training
    trained_classifier(77, folder=tmp_path/'mine', device='cpu')
    assert calls == [77, 77] and (tmp_path/'mine/model.safetensors').exists()

@pytest.mark.parametrize('n_images,n_epochs,folder,kept',
                         [(60_000, 5, None, True), (60_000, 1, None, False), (60, 5, None, False), (60, 1, 'mine', True)])
def test_the_cache_keeps_only_classifiers_like_ours(tmp_path, monkeypatch, n_images, n_epochs, folder, kept):
    class Train:
        def __len__(self): return n_images
    monkeypatch.setattr(miniai.dropout, 'fit_classifier', lambda dd, seed, n_epochs, **kw: SimpleNamespace(model=Classifier(**SMALL)))
    monkeypatch.setattr(miniai.dropout, 'is_drawn', lambda dd: False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    trained_classifier(77, dict(train=Train()), folder and tmp_path/folder, n_epochs, device='cpu')
    assert any(tmp_path.rglob('config.json')) == kept

def test_without_the_real_set_there_is_an_error_and_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(miniai.dropout, 'fashion_mnist', lambda: drawn(20, 20))
    with pytest.raises(RuntimeError, match='not here'): trained_classifier(folder=tmp_path/'new')
    assert not (tmp_path/'new').exists()

@pytest.mark.filterwarnings('ignore:Using DRAWN STAND-IN IMAGES')
@pytest.mark.parametrize('seed', range(3))
def test_the_classifiers_that_come_with_miniai(seed, monkeypatch):
    monkeypatch.setattr(miniai.dropout, 'fit_classifier', None) # nothing is trained
    model = trained_classifier(seed, device='cpu')
    assert model.config == dict(nfs=[16, 32, 64, 128, 256, 512], drop=.1, drop2d=0.)
    dd = fashion_mnist()
    if is_drawn(dd): pytest.skip('only drawn images are here')
    x,y = next(iter(in_memory({k: ds.select(range(2000)) for k,ds in dd.items()}, 1000).valid))
    with torch.no_grad(): assert accuracy(model(x), y) > .92

# a last batch of one, and other numbers

@pytest.mark.parametrize('n,bs,steps', [(40, 39, 1), (41, 8, 5), (40, 8, 5), (42, 8, 6), (9, 16, 1), (3, 2, 1)])
def test_a_last_batch_of_one_is_left_out_and_no_other(n, bs, steps):
    dd = {k: ds.select(range(n)) for k,ds in drawn(60, 60).items()}
    learn = fit_classifier(dd, n_epochs=2, bs=bs, device='cpu', **SMALL)
    assert len(learn.dls.train) == steps and sum(len(x) for x,_ in learn.dls.valid) == n

def test_one_image_is_too_few():
    with pytest.raises(ValueError, match='two or more'):
        fit_classifier({k: ds.select(range(1)) for k,ds in drawn(60, 60).items()}, n_epochs=1, device='cpu', **SMALL)

@pytest.mark.parametrize('kw', [dict(n_epochs=0), dict(n_epochs=-1), dict(n_epochs=1.5), dict(n_epochs=None), dict(bs=1), dict(bs=0),
                                dict(bs=2.5), dict(seed=1.5), dict(nfs=3), dict(nfs=('a', 'b')), dict(nfs=(4,)), dict(nfs=(4, 0)),
                                dict(tfm=3)], ids=str)
def test_wrong_numbers_are_refused_by_name(dd, kw):
    with pytest.raises((ValueError, TypeError), match=next(iter(kw))): fit_classifier(dd, **{'device': 'cpu', **SMALL, **kw})

def test_no_transform_is_none(dd):
    a,b = (fit_classifier(dd, n_epochs=1, device='cpu', tfm=tfm, **SMALL).model.state_dict() for tfm in (None, lambda b: b))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_pixels_up_to_255_are_refused():
    "Scores of hundreds, without a word"
    model,x = Classifier(**SMALL).eval(),torch.rand(2, 1, 28, 28)
    for f in (model, model.features):
        for bad in (x*255, (x*255).round(), (x*255).byte()):
            with pytest.raises(ValueError, match='from 0 to 1, not from 0 to 255'): f(bad)
        for good in (x, x.half().float(), x*2-1, (x-.28)/.35, x*20-8): f(good) # bad samples stray, and are judged
    with pytest.raises(ValueError, match='from 0 to 1'): model.train()((x*255).byte())
    assert model.eval()(torch.rand(0, 1, 28, 28)).shape == (0, 10)

def test_a_classifier_can_be_compiled_as_a_whole():
    model,x = Classifier(**SMALL).eval(),torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(x), model(x))

# files: written whole, read with care

def test_what_cannot_be_written_down_is_refused_before_anything_is_written(tmp_path):
    for about in (dict(t=torch.zeros(2)), dict(a=np.zeros(3)), dict(o=object()), dict(d={'x': [torch.ones(1, 1)]})):
        with pytest.raises(TypeError, match='has to be numbers, strings'): save_classifier(Classifier(**SMALL), tmp_path/'a', **about)
    for model in (nn.Linear(1, 1), Classifier(**SMALL)[:2], None):
        with pytest.raises(TypeError, match='keeps a Classifier'): save_classifier(model, tmp_path/'a')
    assert not (tmp_path/'a').exists()
    save_classifier(Classifier(**SMALL), tmp_path, acc=torch.tensor(.5), n=np.int64(3), f=np.float32(.25))
    assert json.loads((tmp_path/'config.json').read_text())['about'] == dict(acc=.5, n=3, f=.25)

@pytest.mark.parametrize('nm', ['model.safetensors', 'config.json'])
def test_a_save_that_fails_anywhere_leaves_what_was_there(tmp_path, monkeypatch, nm):
    save_classifier(Classifier(**SMALL), tmp_path, seed=1)
    def files(): return {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    before = files()
    replace,write = Path.replace,Path.write_text
    def full(self, *args): raise OSError('no space left')
    monkeypatch.setattr(Path, 'write_text', full if nm == 'config.json' else write)
    monkeypatch.setattr(Path, 'replace', lambda self, to: full(self) if Path(to).name == nm else replace(self, to))
    with pytest.raises(OSError): save_classifier(Classifier((4, 8)), tmp_path, seed=2)
    assert files() == before, 'and nothing unfinished beside it'

def test_several_may_write_at_once(tmp_path, monkeypatch):
    "Temporary names of its own: another process's half-written file is never taken for this one's"
    def other(weights, path): # while one writes, another does
        monkeypatch.setattr(miniai.dropout, 'save_file', save_file)
        save_classifier(Classifier(**SMALL), tmp_path)
        save_file(weights, path)
    monkeypatch.setattr(miniai.dropout, 'save_file', other)
    save_classifier(Classifier(**SMALL), tmp_path)
    assert load_classifier(tmp_path).config['nfs'] == [4, 8, 16]
    assert {f.name for f in tmp_path.iterdir()} == {'model.safetensors', 'config.json'}

def test_a_compiled_classifier_is_kept_under_its_own_names(tmp_path):
    model = Classifier(**SMALL).eval()
    save_classifier(torch.compile(model, backend='eager'), tmp_path)
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(load_classifier(tmp_path)(x), model(x), atol=.05, rtol=.05)

GOOD = dict(nfs=[4, 8, 16], drop=.2, drop2d=0.)
def but(**kw): return json.dumps(GOOD | kw)
@pytest.mark.parametrize('text', ['', '{', '[]', '3', 'null', '{}x', but()[:-5], but(nfs=3), but(nfs='ab'), but(nfs=[4, 0]),
                                  but(nfs=[4.5, 8]), but(drop=2), but(drop='x'), but(device='cuda'), but(__class__='os'),
                                  but(nfs=[1]*1000), but(nfs=[2**40]*3), ' '*200_000+but()], ids=lambda t: t[:20])
def test_a_broken_config_is_named(tmp_path, text):
    save_classifier(Classifier(**SMALL), tmp_path)
    (tmp_path/'config.json').write_text(text)
    with pytest.raises(ValueError, match='config.json is damaged'): load_classifier(tmp_path)

def test_bytes_that_are_no_text_are_named(tmp_path):
    save_classifier(Classifier(**SMALL), tmp_path)
    (tmp_path/'config.json').write_bytes(b'\xff\xfe\x00'*20)
    with pytest.raises(ValueError, match='config.json is damaged'): load_classifier(tmp_path)

def test_sizes_are_read_before_contents(tmp_path, monkeypatch):
    "A config that asks for more than the weights have does not get the memory"
    save_classifier(Classifier(**SMALL), tmp_path)
    (tmp_path/'config.json').write_text(but(nfs=[30_000, 40_000, 50_000])) # 100 GB
    monkeypatch.setattr(miniai.dropout, 'load_file', None)
    with pytest.raises(ValueError, match='model.safetensors .*not of this classifier'): load_classifier(tmp_path)

@pytest.mark.parametrize('change', ['more', 'fewer', 'other shape', 'cut', 'empty', 'text'])
def test_weights_of_something_else_are_named(tmp_path, change):
    model = Classifier(**SMALL)
    save_classifier(model, tmp_path)
    path,state = tmp_path/'model.safetensors',dict(model.state_dict())
    if change == 'more': state['odd'] = torch.ones(1)
    if change == 'fewer': state.popitem()
    if change == 'other shape': state['0.convs.0.0.weight'] = state['0.convs.0.0.weight'][:3]
    if change in ('more', 'fewer', 'other shape'): save_file({k: v.contiguous() for k,v in state.items()}, path)
    else: path.write_bytes({'cut': path.read_bytes()[:-10], 'empty': b'', 'text': b'weights'}[change])
    with pytest.raises(ValueError, match='model.safetensors is damaged, or not of this classifier'): load_classifier(tmp_path)

def test_loading_draws_as_many_random_numbers_as_it_did(tmp_path):
    save_classifier(Classifier(**SMALL), tmp_path)
    def then(f):
        set_seed(0)
        f()
        return torch.rand(1)
    assert then(lambda: load_classifier(tmp_path)) == then(lambda: Classifier(**SMALL)), 'figures in notebooks depend on it'

@pytest.mark.parametrize('folder', ['file', 'file/below'])
def test_a_folder_that_is_a_file_is_refused_before_the_training(tmp_path, monkeypatch, dd, folder):
    monkeypatch.setattr(miniai.dropout, 'fit_classifier', None)
    monkeypatch.setattr(miniai.dropout, 'is_drawn', lambda dd: False)
    (tmp_path/'file').write_text('')
    with pytest.raises((ValueError, OSError), match='file'): trained_classifier(0, dd, tmp_path/folder, device='cpu')

@pytest.mark.parametrize('kw', [dict(n_epochs=0), dict(n_epochs=-1), dict(n_epochs=1.5), dict(dd={}), dict(dd='x'), dict(dd=3)], ids=str)
def test_wrong_arguments_of_trained_classifier(monkeypatch, dd, kw):
    monkeypatch.setattr(miniai.dropout, 'fit_classifier', None)
    with pytest.raises((ValueError, TypeError), match=next(iter(kw))): trained_classifier(77, **{'dd': dd, **kw})
