"Loaders and their workers; images that are cut out of raw files, and others that are decoded"
import io, warnings

import datasets, numpy as np, pytest, torch
import torchvision.transforms.functional as TF
from PIL import Image

from miniai import datasets as md, fashion
from miniai.datasets import (DataLoaders, TensorLoader, check_whole, collate_dict, from_pgm, get_dls, get_grid, in_memory, inplace,
                             show_image, show_images, to_float, to_tensors)
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

@pytest.mark.parametrize('bs', [0, -1, 2.5, '8', None])
def test_bad_batch_size(bs, dd):
    for make in (lambda: TensorLoader(torch.zeros(3), bs=bs), lambda: in_memory(dd, bs)):
        with pytest.raises((TypeError, ValueError), match=f'batch size, must be .*, not {bs!r}'): make()

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
    with pytest.raises(ValueError, match=r'2 kinds: 3 of 7×5 pixels and mode L \(the first is row 0\), 2 of .*\(the first is row 3\)'):
        to_tensors(ds)

def test_a_missing_image_is_an_error():
    ds = datasets.Dataset.from_dict(dict(image=[Image.new('L', (7, 5)), None], label=[0, 1]), features=random_set(1).features)
    with pytest.raises(ValueError, match='row 1 holds NoneType, not a picture'): to_tensors(ds)

def test_no_images():
    for ds in (random_set(0), random_set(3).select([]), random_set(3).filter(lambda o: False)):
        with pytest.raises(ValueError, match='no images'): to_tensors(ds)

HEAD = b'P5 3 2 255\n'
def test_cutting_raw_files():
    files = [HEAD + bytes(range(i, i+6)) for i in range(3)]
    assert from_pgm(files).tolist() == [[[i, i+1, i+2], [i+3, i+4, i+5]] for i in range(3)]
    assert from_pgm([f.replace(b' ', b'\n') for f in files]).shape == (3, 2, 3), 'as Pillow writes it'

@pytest.mark.parametrize('file', [None, b'', HEAD + bytes(5), HEAD + bytes(7), b'P5 3 2 254\n' + bytes(6),
                                  b'P6 3 2 255\n' + bytes(6), b'P5 ' + b'9'*5000 + b' 2 255\n',
                                  b'\x89PNG' + bytes(13), b'P5 3 2 65535\n' + bytes(12), b'P5 0 2 255\n',
                                  b'P5 #3\n3 2 255\n' + bytes(6)])
def test_files_that_cannot_be_cut(file):
    assert from_pgm([file]) is None and from_pgm([HEAD + bytes(6), file]) is None

# Whatever a picture's numbers mean, black becomes lo and white becomes hi.

PICTURES = dict(black=(0, 0, 0), white=(255, 255, 255), grey=(102, 102, 102), red=(255, 0, 0))
def picture(mode, colour):
    "Of one colour, made the way Pillow makes that mode"
    im = Image.new('RGB', (8, 6), PICTURES[colour])
    if mode.startswith('I;16'): return Image.new(mode, (8, 6), im.convert('L').getpixel((0, 0))*257)
    if mode == 'P': return im.quantize(4)
    if mode == 'clear P': # one of the palette's colours is see-through
        im.quantize(4).save(file := io.BytesIO(), 'PNG', transparency=1)
        return Image.open(file)
    if mode == 'PA': return im.quantize(4).convert('PA')
    if mode in ('La', 'RGBa'): return im.convert('LA' if mode == 'La' else 'RGBA').convert(mode)
    return im.convert(mode)

def held(*ims, mode=None):
    "A set of these pictures, each as the library writes it"
    features = datasets.Features(image=datasets.Image(mode=mode), label=datasets.Value('int64'))
    return datasets.Dataset.from_dict(dict(image=list(ims), label=[0]*len(ims)), features=features)

CHANNELS = {'1': 1, 'L': 1, 'I;16': 1, 'I;16B': 1, 'I;16L': 1, 'LA': 2, 'P': 3, 'clear P': 4, 'PA': 4, 'RGB': 3, 'RGBX': 3, 'RGBA': 4,
            'CMYK': 3, 'YCbCr': 3}
@pytest.mark.parametrize('mode', CHANNELS)
def test_black_is_lo_and_white_is_hi_in_every_mode(mode):
    ds = held(*[picture(mode, c) for c in ('black', 'white')]*2)
    dls = in_memory(dict(train=ds, test=ds), 2, x_tfm=lambda x: to_float(x, lo=-1))
    x,_ = next(iter(dls.valid))
    assert x.shape == (4, CHANNELS[mode], 6, 8)
    colours = x[:, :1 if x.shape[1] == 2 else 3] # without how opaque it is, which is all of it
    assert (colours[::2] == -1).all() and (colours[1::2] == 1).all()
    assert (x[:, colours.shape[1]:] == 1).all()

@pytest.mark.parametrize('mode', ['L', 'I;16', 'I;16B', 'P', 'clear P', 'PA', 'RGBX', 'CMYK', 'YCbCr'])
def test_shades_are_those_that_are_seen(mode):
    x,_ = to_tensors(held(*[picture(mode, 'grey')]*2))
    assert x.dtype == torch.uint8 and (x[:,:3].int() - 102).abs().max() <= 1

@pytest.mark.parametrize('mode', ['P', 'clear P', 'PA', 'RGBX', 'CMYK', 'YCbCr'])
def test_colours_are_those_that_are_seen(mode):
    x,_ = to_tensors(held(*[picture(mode, 'red')]*2))
    assert (x[0,:3,0,0].int() - torch.tensor([255, 0, 0])).abs().max() <= 2

@pytest.mark.parametrize('mode', ['La', 'RGBa', 'HSV', 'I;16N'])
def test_modes_that_no_file_holds_are_known_too(mode):
    "A set cannot store them, but a decoder may give them"
    for colour,want in (('black', 0), ('white', 255)):
        seen = np.asarray(md._seen(picture(mode, colour)))
        if mode == 'I;16N': seen = md._from_16_bits(np.stack([seen, np.full_like(seen, 65535)]))[0]
        assert (seen[...,:1] == want).all()

@pytest.mark.parametrize('mode', ['I', 'F'])
def test_modes_without_a_white_are_refused_by_name(mode):
    ds = held(*[picture('L', 'white').convert(mode)]*2)
    with pytest.raises(ValueError, match=f'row 0 holds an image of mode {mode}, in which no number .* white: .*ds.map'): to_tensors(ds)
    white = 255
    mapped = ds.map(lambda o: {'image': Image.fromarray(np.uint8(255*np.array(o['image'])/white))}) # what the message says to do
    assert (to_tensors(mapped)[0] == 255).all()

def test_lab_is_refused_by_name():
    "Back in RGB, its black is not quite black"
    ds = held(*[picture('LAB', 'white')]*2)
    with pytest.raises(ValueError, match=r"row 0 holds an image of mode LAB, .*Image\(mode='RGB'\)"): to_tensors(ds)
    assert (to_tensors(ds.cast_column('image', datasets.Image(mode='RGB')))[0] >= 254).all()

@pytest.mark.parametrize('mode', ['HSV', 'YCbCr', 'CMYK', 'LAB'])
def test_a_colour_space_that_was_asked_for_is_kept(mode):
    ds = held(*[picture('RGB', 'red')]*2, mode=mode)
    x,_ = to_tensors(ds)
    assert np.array_equal(x[0].movedim(0, -1), np.asarray(ds[0]['image'])) and ds[0]['image'].mode == mode

@pytest.mark.parametrize('mode', [*CHANNELS, 'La', 'RGBa', 'HSV', 'LAB'])
def test_pictures_of_every_mode_are_shown_as_they_look(mode):
    if mode.startswith('I;16'): return # one number, drawn by matplotlib's scale
    drawn = show_image(picture(mode, 'red')).images[0].get_array()
    if drawn.ndim == 2: return # without colours
    want = [76, 76, 76] if mode in ('LA', 'La') else [255, 0, 0]
    assert drawn.shape[2] in (3, 4) and abs(drawn[0,0,:3].astype(int) - want).max() <= 5

def test_sixteen_bits_are_rounded_to_eight():
    values = np.array([0, 128, 129, 256, 257, 32767, 32768, 65406, 65407, 65535], dtype=np.uint16)
    x,_ = to_tensors(held(Image.fromarray(values[None])))
    assert x.flatten().tolist() == np.rint(values/257).tolist() == [0, 0, 1, 1, 1, 127, 128, 254, 255, 255]

def test_sixteen_bits_of_which_few_are_used_are_warned_of():
    "The brightest image comes last; all are looked at"
    dark,less = (Image.fromarray(np.full((4, 4), n, dtype=np.uint16)) for n in (200, 4095))
    with pytest.warns(UserWarning, match='16-bit images is 4095 of 65535: they are dark, .* 17 levels of grey'):
        to_tensors(held(dark, dark, less))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        to_tensors(held(dark, Image.fromarray(np.full((4, 4), 60000, dtype=np.uint16))))

@pytest.mark.parametrize('ims,names', [
    ([picture('L', 'white')]*3 + [picture('RGB', 'white')], '3 of 8×6 pixels and mode L .*1 of 8×6 pixels and mode RGB .*row 3'),
    ([picture('L', 'white'), picture('I;16', 'white')], 'mode L .*mode I;16'),
    ([picture('P', 'white'), picture('clear P', 'white')], '2 kinds'),
    ([Image.new('L', (n, 4)) for n in range(2, 9)], r'7 kinds: .*, \.\.\.\. Make them alike')])
def test_several_sizes_or_modes_are_named(ims, names):
    with pytest.raises(ValueError, match=names): to_tensors(held(*ims))

def test_modes_that_are_seen_alike_may_be_mixed():
    x,_ = to_tensors(held(*[picture(m, 'white') for m in ('RGB', 'P', 'CMYK', 'RGBX')]))
    assert x.shape == (4, 3, 6, 8) and (x == 255).all()
    assert (to_tensors(held(picture('1', 'white'), picture('L', 'white')))[0] == 255).all()
    x,_ = to_tensors(held(picture('L', 'white'), picture('RGB', 'white')).cast_column('image', datasets.Image(mode='RGB')))
    assert x.shape == (2, 3, 6, 8), 'what the message says to do'

def test_two_sets_of_other_channels_are_named():
    dd = dict(train=held(picture('L', 'white')), test=held(picture('RGB', 'white')))
    with pytest.raises(ValueError, match='1 channels in the first set, 3 in the second'): in_memory(dd, 2)

def test_what_is_no_picture_is_named():
    ds = datasets.Dataset.from_dict(dict(image=[[[.5]*4]*4]*2, label=[0, 1]))
    with pytest.raises(ValueError, match='row 0 holds list, not a picture'): to_tensors(ds)
    with pytest.raises(ValueError, match='row 0 holds dict, not a picture'):
        to_tensors(held(picture('L', 'white')).cast_column('image', datasets.Image(decode=False)))

@pytest.mark.parametrize('bad', [torch.rand(2, 1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.int64), torch.ones(1, 1, 2, 2).bool(),
                                 np.zeros((2, 1, 4, 4), np.uint8), [[0]], None])
def test_to_float_takes_bytes(bad):
    with pytest.raises(TypeError, match='to_float takes a tensor of bytes'): to_float(bad)

@pytest.mark.parametrize('pad', [-1, -3, 1.5])
def test_padding_is_a_whole_number(pad):
    x = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises((TypeError, ValueError), match='pad must be'): to_float(x, pad=pad)

# A last batch that is not full may be left out, but never where a model is judged.

def sizes(dl): return [len(b[0]) for b in dl]

@pytest.mark.parametrize('n', [32, 33, 47])
def test_drop_last_is_for_training_alone(n):
    ds = random_set(n)
    dd = dict(train=ds, test=ds)
    rows = {k: o.with_transform(to_arrays) for k,o in dd.items()}
    for make in (lambda **kw: in_memory(dd, 16, **kw), lambda **kw: DataLoaders.from_dd(rows, 16, **kw),
                 lambda **kw: DataLoaders(*get_dls(rows['train'], rows['test'], 16, collate_fn=collate_dict(ds), **kw))):
        dls = make(drop_last=True)
        assert sizes(dls.train) == [16]*(n//16) and len(dls.train) == n//16 and sum(sizes(dls.valid)) == n
        assert sum(sizes(make().train)) == sum(sizes(make(drop_last=False).train)) == n

def test_the_order_does_not_depend_on_drop_last(dd):
    def first(**kwargs):
        torch.manual_seed(0)
        return torch.cat([y for _,y in in_memory(dd, 8, **kwargs).train]).tolist()
    assert first(drop_last=True) == first()[:16]

def test_a_last_batch_of_one_is_not_trained_on():
    "BatchNorm refuses it"
    from torch import nn
    model = nn.Sequential(nn.Flatten(), nn.Linear(35, 4), nn.BatchNorm1d(4))
    dd = dict(train=random_set(33), test=random_set(33))
    with pytest.raises(ValueError, match='more than 1 value'): [model(x) for x,_ in in_memory(dd, 16).train]
    assert len([model(x) for x,_ in in_memory(dd, 16, drop_last=True).train]) == 2

# Columns of other names

@pytest.fixture
def img():
    ims = [Image.fromarray(np.full((8, 8, 3), 10*i, np.uint8)) for i in range(4)]
    return datasets.Dataset.from_dict(dict(img=ims, label=[0, 1, 2, 3]))

def tensors(b): return [TF.to_tensor(o) for o in b['img']]
@inplace
def put_beside(b): b['pixels'] = tensors(b); del b['img']
@inplace
def put_and_mark(b): b['pixels'] = tensors(b); b['n'] = [7]*len(b['img']); del b['img']
@inplace
def in_its_place(b): b['img'] = tensors(b)

@pytest.mark.parametrize('tfm', [
    lambda b: dict(pixels=tensors(b), label=b['label']), lambda b: dict(label=b['label'], pixels=tensors(b)),
    lambda b: dict(label=b['label'], img=tensors(b)), put_beside, in_its_place])
def test_rows_have_the_columns_that_a_transform_gives_them(img, tfm):
    ds = img.with_transform(tfm)
    x,y = next(iter(DataLoaders.from_dd(dict(train=ds, test=ds), 2).valid))
    assert x.shape == (4, 3, 8, 8) and y.tolist() == [0, 1, 2, 3]

@pytest.mark.parametrize('tfm,names', [(lambda b: dict(pixels=tensors(b)), ['x']),
    (lambda b: dict(x=tensors(b), n=[7]*len(b['img']), y=b['label']), ['x', 'n', 'y']), (put_and_mark, ['y', 'x', 'n'])])
def test_fewer_and_more_columns(img, tfm, names):
    ds = img.with_transform(tfm)
    got = next(iter(DataLoaders.from_dd(dict(train=ds, test=ds), 2).valid))
    assert len(got) == len(names)
    for nm,o in zip(names, got): assert dict(x=o.shape == (4, 3, 8, 8), n=o.tolist() == [7]*4, y=o.tolist() == [0, 1, 2, 3])[nm]

def test_a_missing_column_is_answered_with_those_that_are_there(img):
    for make in (to_tensors, lambda ds: in_memory(dict(train=ds, test=ds), 2)):
        with pytest.raises(KeyError, match=r"no column 'image', only \['img', 'label'\]: ds.rename_column\('its name', 'image'\)"):
            make(img)
        ds = img.rename_column('img', 'image').rename_column('label', 'fine_label')
        with pytest.raises(KeyError, match=r"no column 'label', only \['image', 'fine_label'\].*select_columns\('image'\)"): make(ds)
    x,y = to_tensors(img.rename_column('img', 'image'))
    assert x[:,0,0,0].tolist() == [0, 10, 20, 30] and y.tolist() == [0, 1, 2, 3]

def test_images_without_labels(img):
    ds = img.rename_column('img', 'image').select_columns('image')
    assert [o.shape for o in to_tensors(ds)] == [(4, 3, 8, 8)]
    assert [[o.shape for o in b] for b in in_memory(dict(train=ds, test=ds), 2).train] == [[(2, 3, 8, 8)]]*2

def test_labels_that_are_no_numbers():
    ds = random_set(3).remove_columns('label').add_column('label', ['shirt', 'coat', 'shirt'])
    with pytest.raises(ValueError, match="column 'label' cannot become a tensor .*class_encode_column"): to_tensors(ds)
    assert to_tensors(ds.class_encode_column('label'))[1].tolist() == [1, 0, 1]
    ds = random_set(3).remove_columns('label').add_column('label', [1, None, 2])
    with pytest.raises(ValueError, match="column 'label' cannot become a tensor"): to_tensors(ds)

# Arguments are looked at where they are given.

@pytest.mark.parametrize('call,error,message', [
    (lambda dd: in_memory(None, 8), TypeError, 'in_memory needs a dict of two sets'),
    (lambda dd: in_memory(dd['train'], 8), TypeError, 'in_memory needs a dict of two sets'),
    (lambda dd: in_memory({'train': dd['train']}, 8), TypeError, 'in_memory needs a dict of two sets'),
    (lambda dd: DataLoaders.from_dd(None, 8), TypeError, 'from_dd needs a dict of two sets'),
    (lambda dd: DataLoaders(3, 4), TypeError, 'gives batches in a `for` loop; 3 does not'),
    (lambda dd: DataLoaders([], None), TypeError, r'None does not \(\[\] is an empty one\)'),
    (lambda dd: DataLoaders(DataLoaders, DataLoaders), TypeError, 'does not'),
    (lambda dd: TensorLoader([1, 2], np.zeros(2), bs=2, shuffle=True), TypeError, 'cuts tensors, not list, ndarray: torch.as_tensor'),
    (lambda dd: TensorLoader(bs=2), TypeError, 'not nothing'),
    (lambda dd: TensorLoader(torch.zeros(2), torch.zeros(2, device='meta'), bs=2), ValueError, 'several devices'),
    (lambda dd: TensorLoader(torch.zeros(2), bs=2, x_tfm=3), TypeError, 'x_tfm changes a batch, it must be a function, not 3'),
    (lambda dd: in_memory(dd, 8, x_tfm='x'), TypeError, 'x_tfm'),
    (lambda dd: inplace(None), TypeError, 'inplace decorates a function, not None'),
    (lambda dd: get_grid(2.5), TypeError, 'the number of images, must be a whole number, not 2.5'),
    (lambda dd: get_grid('4'), TypeError, "not '4'"), (lambda dd: get_grid(0), ValueError, 'at least 1'),
    (lambda dd: get_grid(4, nrows=0), ValueError, 'nrows must be'), (lambda dd: get_grid(4, ncols=1.5), TypeError, 'ncols must be'),
    (lambda dd: show_images(torch.zeros(16, 1, 4, 4), nrows=1, ncols=1), ValueError, '16 images do not fit into 1×1 places'),
    (lambda dd: show_images(torch.zeros(16, 1, 4, 4), 3, 5), ValueError, 'do not fit into 3×5'),
    (lambda dd: collate_dict(dd['train'])([]), ValueError, 'no rows'), (lambda dd: show_images([]), ValueError, 'at least 1')])
def test_wrong_calls(dd, call, error, message):
    with pytest.raises(error, match=message): call(dd)

@pytest.mark.parametrize('dl', [[], range(3), iter(()), 'TensorLoader', 'Dataset'])
def test_any_loader_will_do(dl):
    "Whatever a `for` loop can go through"
    class Rows:
        def __getitem__(self, i): return [1, 2][i]
    dl = TensorLoader(torch.zeros(3), bs=2) if dl == 'TensorLoader' else Rows() if dl == 'Dataset' else dl
    list(DataLoaders(dl, dl).train)

def test_grids_that_fit():
    for kwargs in (dict(nrows=2, ncols=3), dict(nrows=4), dict(ncols=np.int64(2)), dict(nrows=3, ncols=3)):
        assert len(get_grid(np.int64(6), imsize=.2, **kwargs)[1]) >= 6

def test_one_image_alone_is_shown_alone():
    import matplotlib.pyplot as plt
    show_images(torch.zeros(28, 28), imsize=1)
    assert len(plt.gcf().axes) == 1

def test_whole_numbers_of_any_kind():
    for n in (3, np.int32(3), torch.tensor(3), True+2): assert check_whole('n', n, least=3) == 3
    with pytest.raises(ValueError, match='bs must be at least 2, not 1'): check_whole('bs', 1, least=2)
    for bad in (3., float('nan'), np.float64(3), torch.tensor(3.)):
        with pytest.raises(TypeError, match='bs must be a whole number'): check_whole('bs', bad)
