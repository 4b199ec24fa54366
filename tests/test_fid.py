"FID and KID against closed forms, scipy and torchmetrics; what ImageEval refuses, and what it leaves behind"
import gc, math, warnings
from dataclasses import replace

import numpy as np, pytest, scipy.linalg, torch
import torch.nn.functional as F
from torch import nn

from miniai.accel import MixedPrecision
from miniai.datasets import DataLoaders, TensorLoader, to_float
from miniai.dropout import Classifier
from miniai.fid import ImageEval, Inception, Report, _alike, _calc_fid, _calc_kid, _calc_stats, _mmd, _sqrtm_newton_schulz, _squared_mmd
from miniai.init import BatchTransformCB
from miniai.learner import DeviceCB

warns = pytest.mark.filterwarnings('ignore:.*samples are few')

def spd(d, seed, n=None):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n or 3*d, d, generator=gen, dtype=torch.float64).T.cov()

def by_scipy(m1, c1, m2, c2):
    "As the paper's own code does it"
    root = scipy.linalg.sqrtm((c1@c2).numpy())
    return ((m1-m2)**2).sum().item() + np.trace(c1.numpy()+c2.numpy()-2*root.real)

# -- the distances

@pytest.mark.parametrize('d', [1, 3, 40])
def test_the_distance_is_that_of_scipy(d):
    m1,m2 = torch.randn(2, d).double()
    args = m1,spd(d, 1).view(d, d),m2,3*spd(d, 2).view(d, d)
    assert _calc_fid(*args) == pytest.approx(by_scipy(*args), rel=1e-6)

@pytest.mark.parametrize('d', [1, 5])
def test_gaussians_that_share_axes_have_a_closed_form(d):
    m1,m2,s1,s2 = torch.rand(4, d).double()
    q = torch.linalg.qr(torch.randn(d, d).double())[0]
    want = ((m1-m2)**2).sum() + ((s1-s2)**2).sum()
    assert _calc_fid(m1, q@(s1**2).diag()@q.T, m2, q@(s2**2).diag()@q.T) == pytest.approx(want.item(), rel=1e-9)

def test_the_estimate_of_known_gaussians_comes_near():
    torch.manual_seed(0)
    x,y = torch.randn(20_000, 4),torch.randn(20_000, 4)*2 + 1
    assert _calc_fid(*_calc_stats(x), *_calc_stats(y)) == pytest.approx(4*1 + 4*1, rel=.03)

@pytest.mark.parametrize('n', [2, 5, 30])
def test_fewer_images_than_features(n):
    torch.manual_seed(n)
    x,y = torch.randn(n, 64),torch.randn(n, 64)
    a,b = _calc_stats(x),_calc_stats(y)
    assert _calc_fid(*a, *a) == pytest.approx(0, abs=1e-6)
    assert _calc_fid(*a, *b) == pytest.approx(by_scipy(*a, *b), rel=1e-3)
    assert _calc_fid(*a, *b) == pytest.approx(_calc_fid(*b, *a), rel=1e-6)

def test_constant_features():
    zero,one = _calc_stats(torch.zeros(5, 3)),_calc_stats(torch.ones(9, 3))
    assert _calc_fid(*zero, *zero) == 0 and _calc_fid(*zero, *one) == 3

def test_the_root_squared_is_the_matrix():
    a = spd(10, 3, 100)
    root = _sqrtm_newton_schulz(a)
    torch.testing.assert_close(root@root, a)
    torch.testing.assert_close(root, torch.from_numpy(scipy.linalg.sqrtm(a.numpy())))

def test_mmd_pair_by_pair():
    torch.manual_seed(1)
    x,y = torch.randn(6, 3).double(),torch.randn(4, 3).double()
    def k(a, b): return (a@b/3 + 1)**3
    def within(x): return sum(k(a, b) for i,a in enumerate(x) for j,b in enumerate(x) if i != j)/(len(x)*(len(x)-1))
    want = within(x) + within(y) - 2*sum(k(a, b) for a in x for b in y)/24
    assert _squared_mmd(x, y) == pytest.approx(want.item())
    assert _mmd(x, y, _alike(y)) == _mmd(x, y)

def test_kid_needs_enough_images():
    with pytest.raises(ValueError, match='3 images are too few for 4 blocks'): _calc_kid(torch.randn(3, 2), torch.randn(50, 2))

# -- ImageEval

class Net(nn.Module):
    "Ten features of an image in [0, 1]; 4-dimensional, as the 2022 course's models give them"
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.lin,self.drop = nn.Linear(784, 10),nn.Dropout(.5)
    def forward(self, x): return self.drop(self.lin(x.flatten(1)).relu())[..., None, None]

def images(n, seed=0):
    x = torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))**3
    x[..., :3] = 0
    return x

@pytest.fixture
def dls():
    train,valid = (images(1500, 9)*255).byte().split((1100, 400))
    return DataLoaders(TensorLoader(train, torch.zeros(1100), bs=50, shuffle=True, x_tfm=to_float),
                       TensorLoader(valid, torch.zeros(400), bs=64, x_tfm=to_float))

@pytest.fixture
def ie(dls): return ImageEval(Net(), dls)

def test_what_it_keeps(ie):
    assert ie.feats.shape == (400, 10) and ie.stats[0].shape == (10,) and ie.stats[1].shape == (10, 10)
    assert ie.get_feats(images(3)).shape == (3, 10)

@warns
def test_the_same_images_in_any_order_and_batches(ie):
    x,y = images(300),torch.cat([o for o,_ in ie.learn.dls.valid])
    assert ie.fid(y) == pytest.approx(0, abs=1e-6) == ie.fid(y[torch.randperm(400)])
    for other in (x.flip(0), x.split(1), [x[:7], x[7:]], (o for o in x.split(100))):
        assert ie.fid(other) == pytest.approx(ie.fid(x), rel=1e-4)
    assert ie.kid(x.flip(0)) == pytest.approx(ie.kid(x), abs=1e-6)
    feats = ie.get_feats(x)
    assert ie.fid(x) == pytest.approx(by_scipy(*ie.stats, *_calc_stats(feats)), rel=1e-5)
    assert ie.kid(x) == pytest.approx(_squared_mmd(feats, ie.feats), abs=1e-9)

@warns
@pytest.mark.parametrize('lo, pad', [(None, 0), (0, 0), (-1, 0), (0, 2), (-1, 2)])
def test_however_the_samples_are(dls, ie, lo, pad):
    x = images(200)
    said = F.pad(x if lo != -1 else x*2-1, [pad]*4, value=lo or 0)
    assert ImageEval(Net(), dls, lo=lo, pad=pad).fid(said) == pytest.approx(ie.fid(x), rel=1e-4)

@warns
def test_a_judge_that_learnt_from_images_between_minus_one_and_one(ie):
    "As the 2022 course's: padded, from -1 to 1, and samples are like that"
    x,y = (F.pad(o*2-1, [2]*4, value=-1) for o in (images(200), torch.cat([o for o,_ in ie.learn.dls.valid])))
    class Net32(Net):
        def forward(self, x): return super().forward((x[..., 2:-2, 2:-2]+1)/2)
    theirs = ImageEval(Net32(), DataLoaders([], [(y, torch.zeros(400))]), cbs=[DeviceCB()])
    assert theirs.fid(x) == pytest.approx(ie.fid(images(200)), rel=1e-4)
    assert ImageEval(Net32(), DataLoaders([], [(y, y)]), lo=-1).fid(x) == pytest.approx(theirs.fid(x), rel=1e-4)

def nan(k):
    x = images(20)
    x[:k, 0, 5, 5] = math.nan
    return x

@pytest.mark.parametrize('samples, error, message', [
    (F.pad(images(20), [2]*4), ValueError, r'\(1, 32, 32\), the images in dls \(1, 28, 28\): .*pad=2'),
    (images(20)*255, ValueError, 'run from 0.00 to 25.*divided by 255'),
    ((images(20)*255).round(), ValueError, 'divided by 255'),
    ((images(20)*20).round(), ValueError, 'divided by 255'), # very dark
    (images(20).expand(-1, 3, -1, -1), ValueError, r'\(3, 28, 28\)'),
    (3, TypeError, 'samples are images in floating point.*not int'),
    (None, TypeError, 'not NoneType'),
    ((images(20)*255).byte(), TypeError, 'torch.uint8'),
    (images(20)[0], TypeError, r'\(1, 28, 28\)'),
    (np.zeros((2, 1, 28, 28)), TypeError, 'samples are images in floating point'),
    (nan(3), ValueError, '3 of 20 samples'),
    (images(1), ValueError, 'at least two images'),
    ([], ValueError, 'there are no samples'),
    (images(0), ValueError, 'there are no samples'),
    (iter([images(5), images(0)]), ValueError, 'there are no samples'),
    ([torch.zeros(1, 28, 28)]*3, TypeError, 'torch.stack'),
])
@warns
def test_what_does_not_fit_is_an_error_and_nothing_is_left_of_it(ie, samples, error, message):
    dls,before = ie.learn.dls,ie.fid(images(50))
    for f in (ie.fid, ie.report):
        with pytest.raises(error, match=message): f(samples)
    assert ie.learn.dls is dls and ie.fid(images(50)) == before

@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
@warns
def test_other_floating_point(ie, dtype): assert ie.fid(images(200).to(dtype)) == pytest.approx(ie.fid(images(200)), rel=.02)

@pytest.mark.parametrize('kwargs, error, message', [
    (dict(model=Net().lin.forward), TypeError, 'an nn.Module that makes features'),
    (dict(lo=1), ValueError, 'value of black'),
    (dict(pad=-2), ValueError, 'pad must be at least 0, not -2'),
    (dict(pad=1.5), TypeError, 'pad must be a whole number, not 1.5'),
    (dict(dls=None), TypeError, 'dls is a NoneType without train and valid'),
    (dict(dls=DataLoaders([], [])), ValueError, 'dls.valid gave no batch'),
    (dict(dls=DataLoaders([], [(images(9)*255).byte()])), TypeError, 'the images of dls.valid are images in floating point.*uint8'),
    (dict(model=nn.Sequential(nn.Flatten(0))), TypeError, r'features \(n, d\)'),
])
def test_what_cannot_judge(dls, kwargs, error, message):
    with pytest.raises(error, match=message): ImageEval(**dict(model=Net(), dls=dls) | kwargs)

def test_dark_samples_that_were_said_to_have_a_darker_black(dls):
    with pytest.raises(ValueError, match='from 0.00 to 1.00, not from -1 to 1'): ImageEval(Net(), dls, lo=-1).fid(images(20))

@pytest.mark.parametrize('x, message', [(images(9)*2-1, 'from -1'), (F.pad(images(9), [2]*4), r'\(1, 32, 32\)')])
def test_a_classifier_may_have_learnt_from_other_images_than_ours(x, message):
    with pytest.warns(UserWarning, match=message): ie = ImageEval(Classifier(nfs=(4, 8)), DataLoaders([], [(x, torch.zeros(9))]))
    assert len(ie.feats) == 9

@warns
@pytest.mark.parametrize('lo, samples', [
    (None, torch.randn(30, 1, 28, 28)),     # noise
    (None, images(30)*2-1), (None, images(30)-.5), (None, images(30)*1.5),
    (-1, torch.randn(30, 1, 28, 28)*3), (-1, images(30)*40-20), (None, torch.full((30, 1, 28, 28), -1.))])
def test_samples_of_a_bad_model_are_cut_off_and_judged_with_one_warning(dls, lo, samples):
    ie = ImageEval(Net(), dls, lo=lo)
    for f in (ie.fid, ie.kid, lambda x: ie.report(x).fid):
        for x in (samples, (o for o in samples.split(7))):
            with pytest.warns(UserWarning, match='far beyond black and white: they run from') as w: assert math.isfinite(f(x))
            far = [o for o in w if '30 of 30 samples go far beyond' in str(o.message)]
            assert len(far) == 1 and far[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert ie.fid(samples) == pytest.approx(ie.fid(samples.clamp(lo or 0, 1)))

@warns
def test_only_those_that_go_far_beyond_are_counted(ie):
    x = images(40)
    x[3,0,9,9],x[8,0,1,1],x[20] = 1.1,7.,-3.
    with pytest.warns(UserWarning, match='2 of 40 samples'): ie.fid(x)

@pytest.mark.parametrize('lo', [None, -1])
@pytest.mark.parametrize('x', [images(30)*.05, images(30)*.05 - 1, torch.zeros(30, 1, 28, 28), torch.ones(30, 1, 28, 28),
                               torch.full((30, 1, 28, 28), .4)], ids=['dark', 'darkest', 'black or grey', 'white', 'grey'])
@pytest.mark.filterwarnings('ignore:.*samples')
def test_what_samples_may_look_like(dls, lo, x):
    "All black, all white, hardly any contrast: bad samples, and no mistake"
    ie = ImageEval(Net(), dls, lo=lo)
    assert math.isfinite(ie.fid(x)) and ie.get_feats(x[:1]).shape == (1, 10)

@warns
def test_black_at_minus_a_half(dls, ie):
    assert ImageEval(Net(), dls, lo=-.5).fid(images(30)-.5) == pytest.approx(ie.fid(images(30)), rel=1e-4)

@warns
def test_grey_samples_where_the_images_have_three_channels(dls):
    class Colour(Net):
        def forward(self, x): assert x.shape[1] == 3; return super().forward(x.mean(1, keepdim=True))
    coloured = [x.expand(-1, 3, -1, -1) for x,_ in dls.valid]
    assert ImageEval(Colour(), DataLoaders([], coloured)).fid(images(30)) == pytest.approx(ImageEval(Net(), dls).fid(images(30)), rel=1e-3)

@pytest.mark.parametrize('form', [lambda x: x, lambda x: (x,), lambda x: [x, x[:, 0, 0, 0]], lambda x: dict(image=x, label=x[:, 0, 0, 0]),
                                  lambda x: ((x, x[:, 0, 0, 0]), x)])
@warns
def test_batches_of_any_form(ie, form):
    batches = [form(x) for x,_ in ie.learn.dls.valid]
    other = ImageEval(Net(), DataLoaders(batches, batches))
    assert torch.equal(other.feats, ie.feats) and other.floor(300) > 0
    assert other.fid(form(x) for x in images(90).split(30)) == pytest.approx(ie.fid(images(90)))

@warns
def test_the_range_is_that_of_all_images_and_not_of_the_first_batch(ie):
    x = torch.cat([o for o,_ in ie.learn.dls.valid])
    x = x[x.amax((1, 2, 3)).argsort()]
    def range_of(*batches): return ImageEval(Net(), DataLoaders([], batches)).range
    assert range_of(torch.zeros(5, 1, 28, 28), x) == range_of(x[:100]*.1, x) == range_of(x*.1) == range_of(x*.4 + .5) == (0, 1)
    assert range_of(torch.full((5, 1, 28, 28), -1.), x*2-1) == range_of(x, x*2-1) == range_of(x*1.2-1) == (-1, 1)
    assert range_of(x-.5) == range_of(torch.zeros(5, 1, 28, 28), x-.5) == (-.5, .5)
    lo,hi = range_of(x[:9]*.2, (x-.29)/.35) # standardised
    assert lo == pytest.approx(-.29/.35) and hi == pytest.approx((x.max().item()-.29)/.35)
    once = ImageEval(Net(), DataLoaders([], (o for o in x.split(100)))) # may be gone through once
    torch.testing.assert_close(once.feats, ImageEval(Net(), DataLoaders([], [x])).feats)
    black_first = DataLoaders([], [torch.zeros(5, 1, 28, 28), x])
    want = ImageEval(Net(), black_first).fid(images(30))
    assert ImageEval(Net(), black_first, lo=-1).fid(images(30)*2-1) == pytest.approx(want, rel=1e-4)

def test_images_of_several_shapes():
    with pytest.raises(ValueError, match=r'several shapes: \(1, 28, 28\) and \(1, 32, 32\)'):
        ImageEval(Net(), DataLoaders([], [images(9), images(9), F.pad(images(9), [2]*4)]))

@warns
def test_more_samples_than_training_images_have_no_floor():
    for train in ([], [images(9)]):
        r = ImageEval(Net(), DataLoaders(train, [images(50)])).report(images(20))
        assert math.isnan(r.floor) and math.isfinite(r.fid) and 'too few training images for a floor' in str(r)

@warns
def test_one_sample_has_no_kid(ie):
    for f in (ie.kid, ie.fid, ie.report):
        with pytest.raises(ValueError, match='at least two images, not 1'): f(images(1))
    for n in ('x', 2.5):
        with pytest.raises(TypeError, match='the number of images must be a whole number'): ie.floor(n)
    with pytest.raises(ValueError, match='maxs must be at least 1'): _calc_kid(torch.rand(100, 5), torch.rand(100, 5), maxs=0)

def test_a_model_that_gives_nan(dls):
    class Bad(Net):
        def forward(self, x): return super().forward(x)/0
    with pytest.raises(ValueError, match='of 400 rows of features have values that are not finite'): ImageEval(Bad(), dls)

def test_few_samples_warn(ie):
    with pytest.warns(UserWarning, match='999 samples are few'): ie.fid(images(999))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ie.fid(images(1000)); ie.kid(images(1000)); ie.report(images(1000))

def test_a_report_says_what_was_measured_with_what(ie):
    x = images(1000)
    r = ie.report(x, 'a test')
    assert isinstance(r, Report) and (r.fid, r.kid, r.n, r.floor) == (ie.fid(x), ie.kid(x), 1000, ie.floor(1000)) and r.kid_se > 0
    parts = f'FID {r.fid:.1f}',f'the floor of {r.floor:.2f}',f'KID {r.kid:.4f} ± {r.kid_se:.4f}'
    for part in (*parts, 'n=1,000', 'Net, 10 features', '400 images of dls.valid', 'a test'): assert part in str(r)
    assert 'inf × the floor' in str(replace(r, floor=0.)) and str(replace(r, sampler='')).endswith('dls.valid')

def test_the_floor_is_of_as_many_training_images(ie):
    state = torch.get_rng_state()
    floor = ie.floor(1000)
    assert torch.equal(state, torch.get_rng_state()) and floor == ie.floor(1000) == ImageEval(Net(), ie.learn.dls).floor(1000)
    assert 0 < floor < ie.floor(100)
    with pytest.raises(ValueError, match='only 1,100 images'): ie.floor(1101)
    with pytest.raises(ValueError, match='at least two images'): ie.floor(1)

@warns
def test_nothing_of_the_images_is_kept(ie):
    def is_images(o): return issubclass(type(o), torch.Tensor) and o.ndim == 4 and o.shape[-1] == 28 and o.dtype == torch.float32
    def alive(): return [o.shape for o in gc.get_objects() if is_images(o)]
    gc.collect()
    before = alive()
    ie.fid(images(77)); ie.report(images(77))
    gc.collect()
    assert len(alive()) == len(before)

@warns
def test_callbacks_and_the_mode_of_the_model(dls, ie):
    model = Net().train()
    with pytest.warns(UserWarning, match='mixed precision'):
        other = ImageEval(model, dls, cbs=[DeviceCB('cpu'), MixedPrecision(dtype=torch.bfloat16)])
        assert other.fid(images(200)) == pytest.approx(ie.fid(images(200)), rel=.05)
    assert model.training and other.feats.dtype == torch.float32

@warns
def test_batches_go_through_callbacks(dls, ie):
    "Those of the images, of the floor and of the samples"
    darker = ImageEval(Net(), dls, cbs=[DeviceCB('cpu'), BatchTransformCB(lambda b: (b[0]*.5, *b[1:]))])
    with torch.no_grad(): torch.testing.assert_close(darker.get_feats(images(3)), Net().eval()(images(3)*.5)[..., 0, 0])
    assert darker.fid(images(200)) != pytest.approx(ie.fid(images(200)), rel=.01) and darker.floor(300) < ie.floor(300)

@warns
def test_the_learner_is_left_alone(ie):
    before = vars(ie.learn).copy()
    ie.report(images(50))
    assert {k: v for k,v in vars(ie.learn).items() if k[0] != '_'} == {k: v for k,v in before.items() if k[0] != '_'}

def test_a_classifier_gives_its_features_without_its_last_layers(dls):
    clf = Classifier(nfs=(4, 8, 16)).eval()
    ie,x = ImageEval(clf, dls),images(5)
    assert ie.extractor == 'Classifier, 16 features'
    with torch.no_grad(): torch.testing.assert_close(ie.get_feats(x), clf.features(x), atol=1e-3, rtol=1e-3)

def test_inception_without_its_weights(monkeypatch):
    from urllib.error import URLError
    from torchvision.models import Inception_V3_Weights
    asked = []
    def offline(self, **kw):
        asked.append(kw)
        raise URLError('no network')
    monkeypatch.setattr(Inception_V3_Weights, 'get_state_dict', offline)
    with pytest.raises(RuntimeError, match='weights of Inception v3 are not here.*no network'): Inception()
    assert asked == [dict(progress=True, check_hash=True, weights_only=True)]
