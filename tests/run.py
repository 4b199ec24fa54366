"""What `make test` runs: ruff, the package against the notebooks, then tests/, then every notebook in a process of its own.

The last line counts what passed, and the exit status is 0 only if everything did.
"""
import os, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
CORES = os.cpu_count() or 1
ENV = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg') # small tensors gain nothing from threads; processes run side by side

def notebooks():
    "The numbered notebooks that git tracks, not one of yours; outside a checkout, all of them"
    res = subprocess.run(['git', 'ls-files', '-z', 'nbs'], cwd=ROOT, capture_output=True, text=True)
    tracked = {ROOT/nm for nm in res.stdout.split('\0')}
    return [p for p in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')) if not res.stdout or p in tracked]

def lint():
    "Did ruff find nothing? Its rules are in pyproject.toml"
    ruff = [sys.executable, '-m', 'ruff', 'check', '--quiet', '--output-format', 'concise']
    return subprocess.run([*ruff, *notebooks(), 'miniai', 'tests', '.ci', 'setup.py'], cwd=ROOT).returncode == 0

def pytest(*args):
    "Run pytest; how many tests passed, and how many did not"
    with tempfile.TemporaryDirectory() as tmp:
        code = subprocess.run([sys.executable, '-m', 'pytest', f'--junitxml={tmp}/res.xml', *args], cwd=ROOT, env=ENV).returncode
        if not os.path.exists(f'{tmp}/res.xml'): return 0,1
        n = {k: int(v) for k,v in ElementTree.parse(f'{tmp}/res.xml').find('testsuite').items() if v.isdigit()}
    bad = n['failures'] + n['errors']
    return n['tests']-bad-n['skipped'], bad or int(code != 0)

def notebook(path):
    "Run one notebook with nbdev-test in a process of its own: did it pass, how long did it take, what did it say"
    start = time.time()
    res = subprocess.run([Path(sys.executable).with_name('nbdev-test'), path, '--n-workers', '0'],
                         cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ok = res.returncode == 0 and 'Success.' in res.stdout # a path that matches nothing exits with 0 as well
    how = '' if ok else f'exit status {res.returncode}\n{res.stdout[-6000:]}'
    print(f'{"passed" if ok else "FAILED"} {path.relative_to(ROOT)} {time.time()-start:.0f} s {how}', flush=True)
    return ok

def main():
    clean = lint()
    passed,failed = pytest('tests/test_sync.py')
    if failed:
        print('The package and the notebooks do not agree, or a notebook shows a broken run: `make export` mends what it can.')
    else:
        files,paths = sorted(p for p in (ROOT/'tests').glob('test_*.py') if p.name != 'test_sync.py'),notebooks()
        with ThreadPoolExecutor(CORES) as pool:
            counts = pool.map(lambda i: pytest(*files[i::CORES]), range(min(CORES, len(files)))) # all at once: a core that
            results = list(pool.map(notebook, paths)) # is done with its tests goes on with notebooks
        ok,bad = map(sum, zip(*counts))
        passed,failed = passed+ok+sum(results), failed+bad+results.count(False)+(not paths)
    if not clean: print('ruff found what stands at the top of this log')
    print(f'miniai: {passed} passed, {failed} failed{"" if clean else ", and ruff found something"}')
    sys.exit(bool(failed) or not clean)

if __name__ == '__main__': main()
