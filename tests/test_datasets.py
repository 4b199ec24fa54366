"Loaders and their workers; images that are cut out of raw files, and others that are decoded"
import datasets, numpy as np, pytest, torch
from PIL import Image

from miniai import datasets as md, fashion
from miniai.datasets import DataLoaders, TensorLoader, collate_dict, from_pgm, in_memory, inplace, to_float, to_tensors
from miniai.fashion import to_dataset

def random_set(n, h=5, w=7, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (n, h, w), dtype=np.uint8)
    return to_dataset(images, np.arange(n) % 10)

@pytest.fixture
def dd(): return datasets.DatasetDict(train=random_set(20), test=random_set(10, seed=1))

@inplace
def to_arrays(b): b['image'] = [np.array(o, dtype=np.float32) for o in b['image']]

@pytest.mark.parametrize('workers', [dict(num_workers=0), dict(num_workers=2, multiprocessing_context='forkserver'),
                                     dict(num_workers=1, multiprocessing_context='spawn')])
def test_loaders_and_their_workers(dd, workers):
    dls = DataLoaders.from_dd(dd.with_transform(to_arrays), 8, **workers)
    batches = list(dls.train)
    assert [len(x) for x,_ in batches] == [8, 8, 4] and len(dls.valid) == 1
    assert sorted(torch.cat([y for _,y in batches]).tolist()) == sorted(list(range(10))*2)

def test_columns_come_in_the_sets_order(dd):
    ds = dd['train'].select_columns(['label', 'image']).with_transform(to_arrays)
    a,b = collate_dict(ds)([ds[0], ds[1]])
    assert a.tolist() == [0, 1] and b.shape == (2, 5, 7)

def test_too_few_loaders():
    with pytest.raises(ValueError, match='a training and a validation loader'): DataLoaders([1])

def test_in_memory_is_shuffled_anew_each_epoch_and_follows_the_seed(dd):
    dls = in_memory(dd, 8)
    def labels(seed): torch.manual_seed(seed); return [torch.cat([y for _,y in dls.train]).tolist() for _ in range(2)]
    first,second = labels(0)
    assert first != second and sorted(first) == sorted(second) and labels(0) == [first, second]
    assert torch.cat([y for _,y in dls.valid]).tolist() == list(range(10))

@pytest.mark.parametrize('bs', [0, -1])
def test_bad_batch_size(bs):
    with pytest.raises(ValueError, match='batch size must be at least 1'): TensorLoader(torch.zeros(3), bs=bs)

def test_to_float_in_both_ranges():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2,1,1,1)
    assert to_float(x).flatten().tolist() == [0, 1] and to_float(x, pad=1, lo=-1)[:,0,0,0].tolist() == [-1, -1]

def encoded(images, **kwargs):
    "A set of files as Pillow writes them, PNG for most"
    features = datasets.Features(image=datasets.Image(**kwargs), label=datasets.Value('int64'))
    return datasets.Dataset.from_dict(dict(image=[Image.fromarray(o) for o in images], label=list(range(len(images)))), features=features)

def test_colour_images():
    ims = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    x,y = to_tensors(encoded(ims))
    assert x.shape == (3, 3, 4, 5) and torch.equal(x[1, :, 2, 3], torch.from_numpy(ims[1, 2, 3]))

def test_names_that_moved_are_still_here():
    assert all(getattr(md, nm) is getattr(fashion, nm) for nm in fashion.__all__)
    assert set(fashion.__all__) < set(md.__all__)

# Whatever a person does to a set, the pixels are those that its rows show.

@inplace
def darker(b): b['image'] = [o.point(lambda p: p//2) for o in b['image']]
def upside_down(row): return {'image': row['image'].transpose(Image.Transpose.FLIP_TOP_BOTTOM)}

concat = datasets.concatenate_datasets
CHANGES = dict(
    nothing=lambda ds: ds, one=lambda ds: ds.select([3]), slice=lambda ds: ds.select(range(4, 11)), some=lambda ds: ds.select([9, 0, 9, 4]),
    shuffle=lambda ds: ds.shuffle(seed=0), sort=lambda ds: ds.sort('label'), filter=lambda ds: ds.filter(lambda o: o['label'] > 6),
    shuffle_filter=lambda ds: ds.shuffle(seed=0).filter(lambda o: o['label'] > 3).select(range(2, 7)),
    flatten=lambda ds: ds.shuffle(seed=0).flatten_indices(), split=lambda ds: ds.train_test_split(.3, seed=0)['test'],
    shard=lambda ds: ds.shard(3, 1), skip=lambda ds: ds.skip(5).take(6), concat=lambda ds: concat([ds, ds.select([1, 2])]),
    concat_others=lambda ds: concat([random_set(4, seed=1), ds.shuffle(seed=0), random_set(3, seed=2)]),
    interleave=lambda ds: datasets.interleave_datasets([ds, random_set(9, seed=1)]),
    map=lambda ds: ds.map(upside_down), map_some=lambda ds: concat([ds, ds.map(upside_down)]),
    map_label=lambda ds: ds.map(lambda o: {'label': 9-o['label']}),
    shuffle_map=lambda ds: ds.shuffle(seed=0).map(upside_down).select(range(5)),
    rgb=lambda ds: ds.cast_column('image', datasets.Image(mode='RGB')), columns=lambda ds: ds.select_columns(['label', 'image']),
    more=lambda ds: ds.add_column('n', list(range(len(ds)))), torch=lambda ds: ds.with_format('torch'),
    numpy=lambda ds: ds.with_format('numpy'), only=lambda ds: ds.with_format('torch', columns=['label']),
    transform=lambda ds: ds.with_transform(darker))

@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_pixels_are_those_of_the_rows(change):
    ds = change(random_set(20))
    x,y = to_tensors(ds)
    rows = ds.with_format(None)
    want = np.stack([np.array(o['image']) for o in rows])
    assert np.array_equal(x.numpy(), want[:,None] if want.ndim == 3 else np.moveaxis(want, -1, 1))
    assert y.tolist() == [o['label'] for o in rows] and (x.dtype, y.dtype) == (torch.uint8, torch.int64)

def test_map_is_seen():
    ds = random_set(4)
    assert torch.equal(to_tensors(ds.map(upside_down))[0], to_tensors(ds)[0].flip(2))

def test_the_tensors_are_ones_own():
    "Changing them changes no row"
    ds = random_set(1)
    before = np.array(ds[0]['image'])
    to_tensors(ds)[0].add_(1)
    assert np.array_equal(ds[0]['image'], before)

@pytest.fixture
def undecodable(monkeypatch):
    def never(*args, **kwargs): raise AssertionError('a file was decoded')
    monkeypatch.setattr(datasets.Image, 'decode_example', never)

def test_raw_files_are_not_decoded(undecodable):
    for nm in ('nothing', 'one', 'some', 'shuffle', 'split', 'concat_others', 'only', 'transform'):
        assert len(to_tensors(CHANGES[nm](random_set(20)))[0])
    with pytest.raises(AssertionError, match='was decoded'): to_tensors(encoded(np.zeros((2, 5, 7), np.uint8)))

def test_files_that_differ_are_decoded():
    "Raw and PNG, of one size"
    images = np.random.default_rng(3).integers(0, 256, (2, 5, 7), dtype=np.uint8)
    png = encoded(images).cast(random_set(1).features)
    x,_ = to_tensors(datasets.concatenate_datasets([random_set(3), png]))
    assert x.shape == (5, 1, 5, 7) and np.array_equal(x[3:,0], images)

@pytest.mark.parametrize('other', [(7, 5), (5, 8), (1, 35)])
def test_images_of_two_sizes_are_an_error(other):
    "Two of them hold as many pixels as the rest, and one has a header just as long"
    ds = datasets.concatenate_datasets([random_set(3), random_set(2, *other)])
    with pytest.raises(ValueError, match='same shape'): to_tensors(ds)

def test_a_missing_image_is_an_error():
    ds = datasets.Dataset.from_dict(dict(image=[Image.new('L', (7, 5)), None], label=[0, 1]), features=random_set(1).features)
    with pytest.raises(ValueError, match='same shape'): to_tensors(ds)

def test_no_images():
    for ds in (random_set(0), random_set(3).select([]), random_set(3).filter(lambda o: False)):
        with pytest.raises(ValueError, match='no images'): to_tensors(ds)

HEAD = b'P5 3 2 255\n'
def test_cutting_raw_files():
    files = [HEAD + bytes(range(i, i+6)) for i in range(3)]
    assert from_pgm(files).tolist() == [[[i, i+1, i+2], [i+3, i+4, i+5]] for i in range(3)]
    assert from_pgm([f.replace(b' ', b'\n') for f in files]).shape == (3, 2, 3), 'as Pillow writes it'

@pytest.mark.parametrize('file', [None, b'', HEAD + bytes(5), HEAD + bytes(7), b'P5 3 2 254\n' + bytes(6),
                                  b'P6 3 2 255\n' + bytes(6), b'\x89PNG' + bytes(13), b'P5 3 2 65535\n' + bytes(12), b'P5 0 2 255\n',
                                  b'P5 #3\n3 2 255\n' + bytes(6)])
def test_files_that_cannot_be_cut(file):
    assert from_pgm([file]) is None and from_pgm([HEAD + bytes(6), file]) is None
