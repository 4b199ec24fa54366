"Every source of Fashion-MNIST, in its order; damaged files; no network"
import gzip, os, socket, threading, tracemalloc

import datasets, numpy as np, pytest, torch
from huggingface_hub import constants

from miniai import fashion
from miniai.datasets import to_tensors
from miniai.fashion import FASHION_CLASSES, IDX_FILES, drawn, fashion_mnist, from_hub, from_idx, hub_reachable, read_idx, to_dataset

def idx(a): return bytes([0, 0, 8, a.ndim]) + b''.join(n.to_bytes(4, 'big') for n in a.shape) + a.astype(np.uint8).tobytes()

@pytest.fixture
def folder(tmp_path):
    for (im,lbl),n in zip(IDX_FILES.values(), (20, 10)):
        (tmp_path/f'{im}.gz').write_bytes(gzip.compress(idx(np.random.default_rng(n).integers(0, 256, (n, 28, 28)))))
        (tmp_path/lbl).write_bytes(idx(np.arange(n) % 10))
    return tmp_path

@pytest.fixture
def bare(monkeypatch):
    "A machine without data, and with a hub that must not be asked"
    monkeypatch.delenv('MINIAI_DATA', raising=False)
    monkeypatch.setattr(fashion, 'idx_folders', list)
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)

def test_the_folder_that_was_asked_for_comes_first(folder, monkeypatch):
    monkeypatch.setenv('MINIAI_DATA', str(folder))
    dd = fashion_mnist()
    assert {k: len(v) for k,v in dd.items()} == dict(train=20, test=10)
    assert dd['train'].features['label'].names == list(FASHION_CLASSES) and str(folder) in dd['train'].info.description
    im = dd['train'][0]['image']
    assert (im.size, im.mode) == ((28, 28), 'L')

def test_a_folder_that_was_asked_for_and_is_empty_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv('MINIAI_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='train-images-idx3-ubyte'): fashion_mnist()

def test_package_folders_come_next(folder, bare, monkeypatch):
    monkeypatch.setattr(fashion, 'idx_folders', lambda: [folder/'nowhere', folder])
    assert len(fashion_mnist()['train']) == 20

def test_make_data_and_fashion_mnist_mean_the_same_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert fashion.idx_folders()[1] == tmp_path/'miniai/fashion-mnist'

def test_then_the_hub(bare, monkeypatch):
    monkeypatch.setattr(fashion, 'from_hub', lambda timeout: drawn(20, 10))
    assert len(fashion_mnist()['train']) == 20

def test_last_the_stand_in_with_a_warning_that_names_every_source(bare):
    with pytest.warns(UserWarning, match='(?s)STAND-IN.*MINIAI_DATA.*folders.*hub.*make data'): dd = fashion_mnist()
    assert {k: len(v) for k,v in dd.items()} == dict(train=6000, test=1000)
    assert dd['train'].features == drawn(10, 10)['test'].features
    assert 'STAND-IN' in dd['test'].info.description

def test_a_hub_that_never_answers_is_not_waited_for(bare, monkeypatch):
    "It accepts connections and says nothing; `load_dataset` must then be told that it is offline, or it would retry for long"
    server = socket.create_server(('127.0.0.1', 0))
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{server.getsockname()[1]}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)
    assert not hub_reachable(timeout=.2)
    seen = []
    def load_dataset(path): seen.append((path, datasets.config.HF_HUB_OFFLINE)); raise ConnectionError('nobody there')
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    with pytest.raises(ConnectionError): from_hub(timeout=.2)
    assert seen == [(fashion.HUB_ID, True)] and not datasets.config.HF_HUB_OFFLINE, 'told, and put back'
    server.close()

def test_a_hub_that_answers_is_used(bare, monkeypatch):
    server = socket.create_server(('127.0.0.1', 0))
    def answer():
        conn,_ = server.accept(); conn.recv(4096); conn.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n'); conn.close()
    threading.Thread(target=answer, daemon=True).start()
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{server.getsockname()[1]}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(datasets, 'load_dataset', lambda path: (path, datasets.config.HF_HUB_OFFLINE))
    assert from_hub(timeout=20) == (fashion.HUB_ID, False)
    server.close()

def test_what_the_hub_returns_is_what_the_files_return(folder, tmp_path, bare):
    "The hub's set is PNG files in Parquet; written by the same library, read back by the same code"
    from PIL import Image
    dd,hub = from_idx(folder),tmp_path/'hub/data'
    hub.mkdir(parents=True)
    for k,ds in dd.items():
        rows = dict(image=[Image.fromarray(np.array(o)) for o in ds['image']], label=ds['label'][:])
        datasets.Dataset.from_dict(rows, features=ds.features).to_parquet(hub/f'{k}-00000-of-00001.parquet')
    for k,ds in from_hub(str(hub.parent)).items():
        assert ds.features == dd[k].features
        for a,b in zip(to_tensors(ds), to_tensors(dd[k])): assert torch.equal(a, b)

def header(*sizes): return bytes([0, 0, 8, len(sizes)]) + b''.join(n.to_bytes(4, 'big', signed=True) for n in sizes)

TWO = idx(np.arange(12).reshape(2, 2, 3))
@pytest.mark.parametrize('raw,message', [
    (b'', 'not an IDX file'), (b'\0\0', 'not an IDX file'), (b'\0\0\x09' + TWO[3:], 'start with 00 00 08, not 00 00 09'),
    (b'<!DOCTYPE html>', 'not an IDX file'), (TWO[:9], 'header is cut short'), (TWO[:-1], 'promises 12 bytes .* found 11'),
    (TWO + b'x', 'found 13 or more'), (gzip.compress(TWO, mtime=0)[:-8], 'damaged or cut short'),
    (gzip.compress(TWO, mtime=0)[:20] + b'xxxxxxxxx', 'damaged or cut short'),
    (gzip.compress(TWO[:-1]), 'promises 12 bytes .* found 11'), (gzip.compress(TWO + b'xx'), 'found 13 or more'),
    (gzip.compress(TWO)[:-5] + b'xxxxx', 'damaged or cut short'), (gzip.compress(TWO) + b'x', 'damaged or cut short'),
    (gzip.compress(b'<html>'), 'start with 00 00 08'), (gzip.compress(b''), 'not an IDX file'),
    (gzip.compress(TWO[:9]), 'header is cut short'),
    (header(-1, 28, 28), r'negative size: \(-1, 28, 28\)'), (header(2, -3, -2) + bytes(12), 'negative size'),
    (header() + b'x', 'promises 0 dimensions, expected 1 to 4'), (header(*[1]*5) + b'x', 'promises 5 dimensions'),
    (header(*[2]*255), 'promises 255 dimensions'), (b'\0\0\x08\xff', 'promises 255 dimensions'),
    (header(2**31-1, 2**31-1, 2**31-1, 2**31-1), 'more than the limit of 268,435,456'), (header(2**28+1), '268,435,457 bytes .* the limit'),
    (gzip.compress(header(2**31-1)), 'the limit')])
def test_damaged_files(tmp_path, raw, message):
    (tmp_path/'file').write_bytes(raw)
    with pytest.raises(ValueError, match=message) as e: read_idx(tmp_path/'file')
    assert str(tmp_path/'file') in str(e.value)

def test_a_limit_can_be_chosen(tmp_path):
    (tmp_path/'file').write_bytes(TWO)
    assert read_idx(tmp_path/'file', limit=12).shape == (2, 2, 3)
    with pytest.raises(ValueError, match='12 bytes .* the limit of 11'): read_idx(tmp_path/'file', limit=11)

def bomb(path, *sizes, megabytes=200):
    "A header, and behind it, in a hundredth of the bytes and less, that many zeros"
    with gzip.open(path, 'wb', compresslevel=1) as f:
        f.write(header(*sizes))
        for _ in range(megabytes): f.write(bytes(2**20))

def peak(f):
    "Memory that `f` took at its highest, in bytes, and what it raised"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as e: f()
        return tracemalloc.get_traced_memory()[1],str(e.value)
    finally: tracemalloc.stop()

def test_no_more_is_unpacked_than_the_header_promises(tmp_path, folder):
    bomb(tmp_path/'bomb', 2, 2, 3)
    took,said = peak(lambda: read_idx(tmp_path/'bomb'))
    assert took < 2**22 and said.startswith(f'{tmp_path/"bomb"}: the header promises 12 bytes for shape (2, 2, 3), found 13 or more')
    labels = IDX_FILES['train'][1]
    (folder/labels).unlink()
    bomb(folder/f'{labels}.gz', 200*2**20) # as long as it says: many more labels than there could be
    took,said = peak(lambda: from_idx(folder))
    assert took < 2**22 and f'{labels}.gz: the header promises 209,715,200 bytes' in said

def test_only_files_are_read(folder):
    "A pipe would be waited for, for ever"
    name = folder/IDX_FILES['train'][1]
    name.unlink()
    os.mkfifo(name)
    with pytest.raises(FileNotFoundError, match=name.name): from_idx(folder)
    for p in folder.iterdir(): p.unlink()
    os.mkfifo(name)
    assert not fashion.has_idx(folder)

@pytest.mark.parametrize('name,a,message', [
    (IDX_FILES['train'][1], np.zeros(19), '20 images but 19 labels'), (IDX_FILES['train'][1], np.full(20, 10), 'labels run from 10 to 10'),
    (IDX_FILES['test'][1], np.zeros((10, 1)), 'labels'),
    (f'{IDX_FILES["test"][0]}.gz', np.zeros((10, 0, 5)), 'height, width'),
    (f'{IDX_FILES["test"][0]}.gz', np.zeros((10, 2, 2, 1)), 'expected images'),
    (f'{IDX_FILES["test"][0]}.gz', np.zeros(10), 'expected images')])
def test_files_that_do_not_fit_together(folder, name, a, message):
    (folder/name).write_bytes(idx(a))
    with pytest.raises(ValueError, match=message) as e: from_idx(folder)
    assert str(folder) in str(e.value)

def test_empty_sets(folder):
    for im,lbl in IDX_FILES.values():
        (folder/f'{im}.gz').write_bytes(idx(np.zeros((0, 28, 28)))); (folder/lbl).write_bytes(idx(np.zeros(0)))
    dd = from_idx(folder)
    assert len(dd['train']) == 0
    with pytest.raises(ValueError, match='no images'): to_tensors(dd['train'])

def test_the_fingerprint_is_of_the_content():
    "`datasets` tells by it whether a result that it kept is still right"
    images,labels = np.arange(24, dtype=np.uint8).reshape(4, 2, 3),np.arange(4)
    def mark(images, labels, descr=''): return to_dataset(images, labels, descr)._fingerprint
    first = mark(images, labels)
    assert first == mark(images.copy(), labels.copy())
    others = mark(images+1, labels), mark(images, labels[::-1]), mark(images.reshape(4, 3, 2), labels), mark(images, labels, 'x')
    assert len({first, *others}) == 5

BYTES = np.zeros((3, 28, 28), np.uint8)
@pytest.mark.parametrize('images,labels,message', [
    (np.zeros((3, 28, 28)), np.zeros(3, int), r'uint8 \(n, height, width\), not float64 \(3, 28, 28\)'),
    (np.zeros((3, 28, 28), np.float32)+.5, np.zeros(3, int), 'not float32'), (BYTES.astype(int)+7, np.zeros(3, int), 'not int64'),
    (BYTES > 0, np.zeros(3, int), 'not bool'), (BYTES.view(np.int8), np.zeros(3, int), 'not int8'),
    (BYTES.astype('u2'), [0]*3, 'not uint16'),
    (BYTES[...,None], np.zeros(3, int), r'not uint8 \(3, 28, 28, 1\)'), (BYTES[0], np.zeros(28, int), r'not uint8 \(28, 28\)'),
    (BYTES[:,:0], np.zeros(3, int), 'not uint8'), ([[1]], [1], 'not list'), (None, None, 'not NoneType'),
    (torch.zeros(3, 2, 2), [0]*3, 'not Tensor'),
    (BYTES, np.array([.5, 1, 1]), 'whole numbers, not float64'), (BYTES, ['a', 'b', 'c'], 'whole numbers'),
    (BYTES, [True]*3, 'whole numbers'),
    (BYTES, np.zeros((3, 1), int), r'3 images but \(3, 1\) labels'), (BYTES, None, '3 images but'),
    (BYTES, [0, 1], '3 images but 2 labels'),
    (BYTES, [0, 1, -1], 'labels run from -1 to 1')])
def test_what_no_set_can_be_made_of(images, labels, message):
    with pytest.raises(ValueError, match=message): to_dataset(images, labels)

@pytest.mark.parametrize('labels', [[0, 1, 2], (0, 1, 2), np.array([0, 1, 2], np.uint8), np.array([0, 1, 2], '>i4')])
def test_labels_of_any_whole_numbers(labels):
    ds = to_dataset(BYTES, labels)
    assert ds['label'][:] == [0, 1, 2] and np.array_equal(ds[2]['image'], BYTES[2])
    assert to_tensors(ds)[1].tolist() == [0, 1, 2]

def test_which_set_is_drawn(folder):
    assert fashion.is_drawn(drawn(10, 10)) and fashion.is_drawn({'train': drawn(10, 10)['test']})
    assert not fashion.is_drawn(from_idx(folder)) and not fashion.is_drawn({}) and not fashion.is_drawn(datasets.DatasetDict())
