"""What `make test` runs: the package against the notebooks, then tests/, then every notebook in a process of its own.

The last line counts what passed, and the exit status is 0 only if everything did.
"""
import os, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
CORES = os.cpu_count() or 1
ENV = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg') # small tensors gain nothing from threads; processes run side by side

def pytest(*args):
    "Run pytest; how many tests passed, and how many did not"
    with tempfile.TemporaryDirectory() as tmp:
        code = subprocess.run([sys.executable, '-m', 'pytest', f'--junitxml={tmp}/res.xml', *args], cwd=ROOT, env=ENV).returncode
        if not os.path.exists(f'{tmp}/res.xml'): return 0,1
        n = {k: int(v) for k,v in ElementTree.parse(f'{tmp}/res.xml').find('testsuite').items() if v.isdigit()}
    bad = n['failures'] + n['errors']
    return n['tests']-bad-n['skipped'], bad or int(code != 0)

def notebook(path):
    "Run one notebook with nbdev_test in a process of its own: did it pass, how long did it take, what did it say"
    start = time.time()
    res = subprocess.run([Path(sys.executable).with_name('nbdev_test'), path, '--n-workers', '0'],
                         cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ok = res.returncode == 0 and 'Success.' in res.stdout # a path that matches nothing exits with 0 as well
    how = '' if ok else f'exit status {res.returncode}\n{res.stdout[-6000:]}'
    print(f'{"passed" if ok else "FAILED"} {path.relative_to(ROOT)} {time.time()-start:.0f} s {how}', flush=True)
    return ok

def main():
    passed,failed = pytest('tests/test_sync.py')
    if failed:
        print('The package and the notebooks do not agree (or the notebooks are not clean): `make export` mends that.')
    else:
        ok,bad = pytest('tests', '--ignore=tests/test_sync.py')
        paths = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
        with ThreadPoolExecutor(CORES) as pool: results = list(pool.map(notebook, paths))
        passed,failed = passed+ok+sum(results), failed+bad+results.count(False)+(not paths)
    print(f'miniai: {passed} passed, {failed} failed')
    sys.exit(bool(failed))

if __name__ == '__main__': main()
