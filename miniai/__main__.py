"What a bug report needs: `python -m miniai` prints versions, device, where the images come from, and the budget"
import os, platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = 'torch torchvision datasets diffusers fastcore fastprogress nbdev'.split()

def found(package: str) -> str:
    "Its name and version"
    try: return f'{package} {version(package)}'
    except PackageNotFoundError: return f'{package} (not installed)'

def device() -> str:
    "What fits run on"
    import torch
    from miniai.conv import def_device
    name = f' ({torch.cuda.get_device_name()})' if def_device == 'cuda' else ''
    return f'{def_device}{name}, {torch.get_num_threads()} threads on {os.cpu_count()} cores'

def images() -> str:
    "The source that `fashion_mnist` would take, found without loading it; the hub gets two seconds to answer"
    from miniai.fashion import HUB_ID, has_idx, hub_reachable, idx_folders
    if folder := os.environ.get('MINIAI_DATA'): return folder + (' (MINIAI_DATA)' if has_idx(folder) else ' (MINIAI_DATA): no IDX files')
    for folder in idx_folders():
        if has_idx(folder): return str(folder)
    from datasets import config
    if (Path(config.HF_DATASETS_CACHE)/HUB_ID.replace('/', '___')).exists(): return f"the hub's cache ({HUB_ID})"
    return f'the hub ({HUB_ID})' if hub_reachable(2.) else 'none: garments are drawn in place of Fashion-MNIST'

def budget() -> str:
    "How much the notebooks run"
    from miniai.training import budget_name
    return budget_name()

def main() -> None:
    "Print it; what cannot be found out is said, too"
    print(f'{found("miniai")} in {Path(__file__).parent}')
    print(f'Python {platform.python_version()} on {platform.platform()}')
    print(', '.join(map(found, PACKAGES)))
    for f in (device, images, budget):
        try: print(f'{f.__name__:8}{f()}')
        except Exception as e: print(f'{f.__name__:8}{type(e).__name__}: {e}')

if __name__ == '__main__': main()
