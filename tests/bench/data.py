"""Images a second, row by row through the `datasets` library and from memory; and what a hub that is not there costs."""
import os, socket, time, warnings
from functools import partial

os.environ.pop('HF_HUB_OFFLINE', None)
import numpy as np, torch
import torchvision.transforms.functional as TF
from huggingface_hub import constants

from miniai.datasets import DataLoaders, fashion_mnist, from_hub, in_memory, inplace, to_float

@inplace
def to_tensors(b): b['image'] = [TF.to_tensor(o) for o in b['image']]

def images_per_second(dl, n):
    start = seen = 0
    for i,(x,_) in enumerate(dl):
        if i == 0: start = time.perf_counter() # the first batch pays for the start of workers
        else: seen += len(x)
        if seen >= n: break
    return seen/(time.perf_counter()-start)

def main():
    start = time.perf_counter()
    dd = fashion_mnist()
    print(f"fashion_mnist(): {time.perf_counter()-start:.2f} s, {dd['train'].info.description}")
    start = time.perf_counter()
    mem = in_memory(dd, 128, x_tfm=partial(to_float, pad=2, lo=-1))
    print(f'in_memory(): {time.perf_counter()-start:.2f} s, once')
    rows = dd.with_transform(to_tensors)
    base = np.median([images_per_second(DataLoaders.from_dd(rows, 128).train, 4000) for _ in range(3)])
    for name,dl,n in [('from_dd, 2 workers', DataLoaders.from_dd(rows, 128, num_workers=2).train, 20_000), ('in_memory', mem.train, 50_000)]:
        rate = np.median([images_per_second(dl, n) for _ in range(3)])
        print(f'{name:20} {rate:10,.0f} images a second, {rate/base:5.1f} times those of from_dd ({base:,.0f})')

    server = socket.create_server(('127.0.0.1', 0)) # accepts connections, never answers
    constants.ENDPOINT = f'http://127.0.0.1:{server.getsockname()[1]}'
    start = time.perf_counter()
    try: from_hub()
    except Exception as e: print(f'a hub that never answers: {type(e).__name__} after {time.perf_counter()-start:.1f} s')

if __name__ == '__main__': main()
