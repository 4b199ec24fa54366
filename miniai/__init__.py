"miniai: a small PyTorch framework, written in the notebooks of `nbs/`"

def __getattr__(name):
    if name == '__version__':
        from importlib.metadata import version
        return version('miniai')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
