"The drawn garments: every one can be drawn, and naming them must be learned"
import numpy as np, pytest

from miniai import standin

@pytest.mark.parametrize('garment', standin.GARMENTS, ids=lambda f: f.__name__)
def test_every_garment_can_be_drawn(garment):
    "tshirt trouser pullover dress coat sandal shirt sneaker bag boot: on `top`, `shoe` and `arch`, between black and full"
    rng = np.random.default_rng(0)
    px = np.arange(28, dtype='f4')
    shape,ink = garment(lambda lo=0., hi=1.: rng.random((40,1,1), dtype='f4')*(hi-lo)+lo, px-13.5, px[:,None])
    shape,ink = np.broadcast_arrays(shape, ink)
    assert shape.shape == (40,28,28) and np.isfinite(ink).all() and 0 <= shape.min() and shape.max() <= 1
    assert (.05 < shape.mean((1,2))).all() and (shape.mean((1,2)) < .9).all() and shape.std(0).max() > .05

def test_drawn_classes_can_be_learned_but_not_without_learning():
    (x,y),(xv,yv) = standin.draw_garments(2000, seed=0),standin.draw_garments(500, seed=1)
    means = np.stack([x[y==c].mean(0) for c in range(10)])
    acc = (((xv[:,None]-means)**2).sum((2,3)).argmin(1) == yv).mean()
    assert .6 < acc < .95

def test_a_class_can_be_drawn_from_a_seed():
    a,b = standin.draw_class(3, 4, 7),standin.draw_class(3, 4, np.random.default_rng(7))
    assert np.array_equal(a, b) and a.any()

@pytest.mark.parametrize('c', [10, -1, 2.5, 'coat', None])
def test_a_class_that_is_not_there(c):
    with pytest.raises(ValueError, match='classes 0 to 9, but no'): standin.draw_class(c, 1, 0)
