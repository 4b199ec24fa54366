"""Accuracy of the classifier of 10_dropout on the 10,000 test images: without dropout, with dropout before the last layer, and with
`Dropout2d` after the first block as well. 5 epochs of 60,000 images, with several seeds each.

    python tests/bench/dropout.py              # 80 minutes on two cores, one run on each; interrupted, a second call goes on
    python tests/bench/dropout.py --validate   # how mirroring and bs were chosen: two epochs of 50,000 training images, judged by
                                               # the other 10,000

Results: tests/bench/dropout.json, which the notebook 92 draws.
"""
import argparse, json, os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from fastcore.basics import noop

import miniai.augment # noqa: F401 capture_preds
from miniai.datasets import fashion_mnist
from miniai.dropout import fit_classifier, save_classifier
from miniai.training import accuracy

RESULTS = Path(__file__).with_suffix('.json')
VARIANTS = {'dropout': dict(drop=.1), 'no dropout': dict(drop=0.), 'dropout and dropout2d': dict(drop=.1, drop2d=.1)}

def mirror(batch):
    "Half of the images, left to right"
    x,y = batch
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < .5, x.flip(-1), x),y

def validate(train):
    dd = {'train': train.select(range(50_000)), 'valid': train.select(range(50_000, 60_000))}
    for bs in (128, 256):
        for tfm in (noop, mirror):
            preds,targs = fit_classifier(dd, n_epochs=2, bs=bs, tfm=tfm).capture_preds()
            print(f'bs {bs}, {tfm.__name__}: {accuracy(preds, targs):.2%} of the images held back', flush=True)

def train(name, seed, folder):
    if (folder/'config.json').exists(): return
    dd,start = fashion_mnist(),time.perf_counter()
    learn = fit_classifier(dd, seed, **VARIANTS[name])
    minutes = (time.perf_counter()-start)/60
    acc = accuracy(*learn.capture_preds()).item()
    save_classifier(learn.model, folder, accuracy=acc, seed=seed, data=dd['train'].info.description, torch=torch.__version__)
    print(f'{name}, seed {seed}: {acc:.2%} after {minutes:.1f} minutes', flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--validate', action='store_true')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--out', type=Path, default=Path('_run/classifiers'), help='where trained classifiers are kept')
    jobs = 1 if torch.accelerator.is_available() else os.cpu_count()
    parser.add_argument('--jobs', type=int, default=jobs, help='runs at a time, one thread each if several')
    args = parser.parse_args()
    if args.validate: return validate(fashion_mnist()['train'])
    folders = {(name, seed): args.out/f'{name}-{seed}'.replace(' ', '-') for name in VARIANTS for seed in range(args.seeds)}
    threads = 1 if args.jobs > 1 else torch.get_num_threads()
    with ProcessPoolExecutor(args.jobs, get_context('spawn'), torch.set_num_threads, (threads,)) as pool:
        list(pool.map(train, *zip(*folders), folders.values()))
    res = {}
    for name in VARIANTS:
        abouts = [json.loads((folders[name,seed]/'config.json').read_text())['about'] for seed in range(args.seeds)]
        accs = torch.tensor([o['accuracy'] for o in abouts])
        res[name] = dict(mean=accs.mean().item(), std=accs.std().item(), seeds=accs.tolist(), torch=abouts[0]['torch'])
        print(f'{name:22} {accs.mean():.2%} ± {accs.std():.2%}   ({", ".join(f"{a:.2%}" for a in accs)})')
    RESULTS.write_text(json.dumps(res, indent=1), encoding='utf-8')

if __name__ == '__main__': main()
