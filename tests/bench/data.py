"""Seconds to have the images in memory, images a second from there and row by row; and what a hub that is not there costs.

With --save the results go to tests/bench/data.json, which the notebook 92 draws.
"""
import argparse, json, os, socket, time
from functools import partial
from pathlib import Path

os.environ.pop('HF_HUB_OFFLINE', None)
import numpy as np
import torchvision.transforms.functional as TF
from datasets import Image
from huggingface_hub import constants

from machine import machine
from miniai.datasets import DataLoaders, fashion_mnist, from_hub, in_memory, inplace, to_float, to_tensors

@inplace
def as_tensors(b): b['image'] = [TF.to_tensor(o) for o in b['image']]

def timed(f, *args, **kwargs):
    start = time.perf_counter()
    res = f(*args, **kwargs)
    return res, time.perf_counter()-start

def images_per_second(dl, n):
    start = seen = 0
    for i,(x,_) in enumerate(dl):
        if i == 0: start = time.perf_counter() # the first batch pays for the start of workers
        else: seen += len(x)
        if seen >= n: break
    return seen/(time.perf_counter()-start)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--save', action='store_true', help='keep the figures in tests/bench/data.json')
    save = parser.parse_args().save
    dd,read = timed(fashion_mnist)
    mem,kept = timed(in_memory, dd, 128, x_tfm=partial(to_float, pad=2, lo=-1))
    print(f"fashion_mnist() {read:.2f} s + in_memory() {kept:.2f} s, once; {dd['train'].info.description}")
    gray = dd['train'].cast_column('image', Image(mode='L')) # which must be decoded to know
    cut,decoded = [np.median([timed(to_tensors, ds)[1] for _ in range(3)]) for ds in (dd['train'], gray)]
    print(f'to_tensors() of 60,000: {cut:.2f} s where raw files are cut, {decoded:.2f} s where files are decoded')
    res = dict(machine=machine(), fashion_mnist=read, in_memory=kept, cut=cut, decoded=decoded, images_per_second={})
    rows = dd.with_transform(as_tensors)
    base = np.median([images_per_second(DataLoaders.from_dd(rows, 128).train, 4000) for _ in range(3)])
    res['images_per_second']['from_dd'] = base
    workers = DataLoaders.from_dd(rows, 128, num_workers=2).train
    for name,dl,n in [('from_dd, 2 workers', workers, 20_000), ('in_memory', mem.train, 50_000)]:
        res['images_per_second'][name] = rate = np.median([images_per_second(dl, n) for _ in range(3)])
        print(f'{name:20} {rate:10,.0f} images a second, {rate/base:5.1f} times those of from_dd ({base:,.0f})')

    server = socket.create_server(('127.0.0.1', 0)) # accepts connections, never answers
    constants.ENDPOINT = f'http://127.0.0.1:{server.getsockname()[1]}'
    start = time.perf_counter()
    try: from_hub()
    except Exception as e: print(f'a hub that never answers: {type(e).__name__} after {time.perf_counter()-start:.1f} s')
    if save: (Path(__file__).parent/'data.json').write_text(json.dumps(res, indent=1)+'\n', encoding='utf-8')

if __name__ == '__main__': main()
