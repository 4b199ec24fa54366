"The commands around the notebooks: make, set-up, the lesson runner, copies to learn on, metadata, and the README's example"
import contextlib, json, os, pty, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat, pytest

ROOT = Path(__file__).resolve().parent.parent

def sh(*args, cwd=ROOT, **env): return subprocess.run(args, cwd=cwd, text=True, capture_output=True, env=os.environ | env)

def test_make_alone_lists_every_command():
    out = sh('make').stdout
    for target in 'help setup demo test stress lessons data bench docs lab edit export clean'.split():
        assert re.search(rf'^make {target} +\S', out, re.M), target

def script(path, body):
    path.write_text(f'#!/bin/sh\n{body}\n')
    path.chmod(0o755)

@pytest.fixture
def project(tmp_path):
    "The set-up script in a folder of its own, and a PATH with nothing but what it is given"
    shutil.copytree(ROOT/'.ci', tmp_path/'.ci')
    shutil.copy(ROOT/'constraints.txt', tmp_path)
    (tmp_path/'bin').mkdir()
    for tool in ('rm', 'tail', 'dirname', 'sed', 'grep', 'touch'): (tmp_path/'bin'/tool).symlink_to(shutil.which(tool))
    return tmp_path

def test_no_python_gets_one_line(project):
    res = sh('/bin/sh', '.ci/setup.sh', 'demo', cwd=project, PATH=str(project/'bin'))
    assert res.returncode == 1 and not (project/'.venv').exists()
    assert res.stderr == 'miniai: needs Python 3.11 or newer. Install it, or name it: make PYTHON=/path/to/python3.12 demo\n'

def test_an_old_python_is_passed_over(project):
    for nm in ('python3', 'python'): script(project/'bin'/nm, 'exit 1')
    assert 'needs Python 3.11' in sh('/bin/sh', '.ci/setup.sh', 'demo', cwd=project, PATH=str(project/'bin')).stderr

def test_no_venv_gets_one_line(project):
    script(project/'bin/python3', '[ "$1" = -c ] && exit 0\necho "No module named venv" >&2\nexit 1')
    res = sh('/bin/sh', '.ci/setup.sh', 'demo', cwd=project, PATH=str(project/'bin'))
    assert res.returncode == 1 and len(res.stderr.splitlines()) == 1
    assert 'python3-venv' in res.stderr and 'No module named venv' in res.stderr

def set_up(project, system='Linux', reachable=True, **env):
    "Run the set-up script with a pip that only notes how it is called; what it was called with, and what was said"
    (project/'.venv/bin').mkdir(parents=True)
    script(project/'.venv/bin/python', '[ "$1" = -c ] && exit 0\necho "$*" >>pip.log\n'
           f'case "$*" in *download.pytorch.org*) exit {int(not reachable)};; esac')
    script(project/'bin/uname', f'echo {system}')
    res = sh('/bin/sh', '.ci/setup.sh', 'demo', cwd=project, **{'PATH': str(project/'bin'), 'CPU': ''} | env)
    return res,(project/'pip.log').read_text().splitlines()

def test_set_up_is_one_installation_that_shows_its_progress(project):
    res,(call,) = set_up(project)
    assert res.returncode == 0 and (project/'.venv/.ready').exists() and '6 GB' in res.stderr
    assert '--quiet' not in call and call.endswith('--editable .[dev]')

def test_cpu_takes_pytorchs_index_first(project):
    res,(torch,rest) = set_up(project, CPU='1')
    pins = re.findall(r'^torch(?:vision)?==.*', (ROOT/'constraints.txt').read_text(), re.M)
    assert res.returncode == 0 and '2 GB' in res.stderr and len(pins) == 2
    assert '--no-deps' in torch and '--index-url https://download.pytorch.org/whl/cpu' in torch
    assert torch.endswith(' '.join(f'{o}+cpu' for o in pins)) and rest.endswith('--editable .[dev]')

def test_cpu_without_pins_takes_what_the_index_has(project):
    (project/'constraints.txt').write_text('')
    assert set_up(project, CPU='1')[1][0].endswith(' torch torchvision')

def test_cpu_where_the_index_is_out_of_reach_says_what_to_do(project):
    res,calls = set_up(project, CPU='1', reachable=False)
    assert res.returncode == 1 and len(calls) == 1 and not (project/'.venv/.ready').exists()
    assert 'Without CPU=1' in res.stderr.splitlines()[-1]

def test_cpu_is_what_a_mac_gets_anyway(project): assert len(set_up(project, 'Darwin', CPU='1')[1]) == 1

def test_make_data_says_where_the_images_are(project, tmp_path):
    cache = tmp_path/'cache/miniai/fashion-mnist'
    cache.mkdir(parents=True)
    (cache/'train-images-idx3-ubyte.gz').touch()
    res = sh('/bin/sh', '.ci/data.sh', cwd=project, XDG_CACHE_HOME=str(tmp_path/'cache'))
    assert res.returncode == 0 and 'already' in res.stdout

def test_make_data_without_apt_says_what_else_there_is(project):
    if Path('/usr/share/datasets/fashion-mnist').exists(): pytest.skip('the images are installed here, so apt is not asked')
    res = sh('/bin/sh', '.ci/data.sh', cwd=project, PATH=str(project/'bin'), XDG_CACHE_HOME=str(project))
    assert res.returncode == 1 and 'MINIAI_DATA' in res.stdout

CELLS = ["# A lesson", "import os, torch\nfrom torch import nn\nfrom miniai.training import out_dir\n"
         "from miniai.datasets import DataLoaders\nfrom miniai.learner import *\nprint('budget tiny | budget line')",
         "batches = [(torch.randn(4,2), torch.randn(4,1))]*SIZE\n"
         "cbs = [MetricsCB(), ProgressCB()]\n"
         "TrainLearner(nn.Linear(2,1), DataLoaders(batches, []), nn.MSELoss(), cbs=cbs).fit(2, valid=False)",
         "(out_dir()/'result.txt').write_text('made')"]

@pytest.fixture
def lesson(tmp_path):
    "The runner beside a small notebook, as in the project"
    def make(*changes, stdout=subprocess.PIPE):
        cells = list(CELLS)
        for a,b in changes: cells = [c.replace(a, b) for c in cells]
        for d in ('.ci', 'nbs'): (tmp_path/d).mkdir()
        shutil.copy(ROOT/'.ci/lesson.py', tmp_path/'.ci')
        new = nbformat.v4
        nb = new.new_notebook(cells=[new.new_markdown_cell(cells[0]), *(new.new_code_cell(c, id=f'c{i}') for i,c in enumerate(cells) if i)])
        for c in nb.cells[1:]: c.update(outputs=[new.new_output('stream', text='STALE')], execution_count=7) # as a stored notebook has
        nbformat.write(nb, tmp_path/'nbs/12_small.ipynb')
        env = {k: v for k,v in os.environ.items() if k != 'IN_TEST'} | dict(PYTHONPATH=str(ROOT))
        return subprocess.Popen([sys.executable, '.ci/lesson.py', 'nbs/12_small.ipynb'], cwd=tmp_path, text=True, env=env,
                                stdout=stdout, stderr=subprocess.STDOUT)
    return make

def test_a_lesson_shows_its_progress_and_leaves_its_results(lesson, tmp_path):
    out,_ = (proc := lesson(('SIZE', '3'))).communicate(timeout=120)
    assert proc.returncode == 0, out
    assert 'budget line' in out and re.search(r'epoch +train +loss', out) and re.search(r'^ +1 +train +\d', out, re.M)
    assert '[0/2 ' in out and 'miniai: done' in out
    run = tmp_path/'_run'
    assert (run/'result.txt').read_text() == 'made' and '<table' in (run/'12_small.html').read_text(encoding='utf-8')
    assert any('budget line' in str(c.get('outputs')) for c in nbformat.read(run/'12_small.ipynb', 4).cells)
    assert '_run/result.txt' in out and '[1/4] A lesson\n' in out and '\x1b' not in out
    assert 'STALE' not in (run/'12_small.ipynb').read_text(encoding='utf-8')
    took = json.loads((run/'times.json').read_text())['tiny']
    assert list(took) == [f'12_small/c{i}' for i in (1, 2, 3)] and took['12_small/c1'] > 0

def test_a_lesson_on_a_terminal_has_one_line_that_changes(lesson):
    here,there = pty.openpty()
    proc,out = lesson(('SIZE', '3'), stdout=there),b''
    os.close(there)
    with contextlib.suppress(OSError): # the terminal is gone when the lesson has ended
        while new := os.read(here, 9999): out += new
    assert proc.wait(60) == 0, out
    assert b'\r\x1b[K[1/4] A lesson' in out and b'miniai: done' in out

def test_time_left_is_that_of_the_last_run_at_this_runs_speed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'.ci')
    import lesson
    monkeypatch.setattr(lesson, 'ROOT', tmp_path); monkeypatch.setattr(lesson, 'OUT', tmp_path/'_run')
    for d,cells in (('.ci', dict(a=1, b=1, c=1)), ('_run', dict(a=60, b=600, c=600))):
        (tmp_path/d).mkdir()
        (tmp_path/d/'times.json').write_text(json.dumps(dict(cpu={f'12/{k}': v for k,v in cells.items()})))
    now = 1000.
    monkeypatch.setattr(lesson.time, 'monotonic', lambda: now)
    clock = lesson.Clock([Path('12.ipynb')])
    assert clock.left() == '' # before the budget is known
    clock.begin('12/a'); now += 150; clock.end() # 150 s in place of 60: with the half minute, twice as long
    clock.budget = 'cpu'
    assert clock.left() == ', about 40 min left'
    clock.begin('12/b'); now += 900
    assert clock.left() == ', about 25 min left'
    now += 1800 # far longer than the last time
    assert clock.left() == ', about 20 min left'
    clock.stems.add('13') # never timed
    assert clock.left() == ''

def test_a_lesson_that_fails_says_where(lesson, tmp_path):
    out,_ = (proc := lesson(('SIZE', '0'))).communicate(timeout=120)
    assert proc.returncode == 1 and 'failed in "A lesson"' in out and 'gave no batch' in out
    assert (tmp_path/'_run/12_small.ipynb').exists() and 'result.txt' not in out

def test_ctrl_c_ends_a_lesson_with_a_clear_line(lesson, tmp_path):
    proc,seen = lesson(('SIZE', '10_000_000')),''
    while '[0/2 ' not in seen: seen += proc.stdout.readline() or pytest.fail(f'it ended: {seen}')
    time.sleep(1) # into the first epoch
    proc.send_signal(signal.SIGINT)
    out,_ = proc.communicate(timeout=60)
    assert proc.returncode == 130 and 'interrupted in "A lesson" after' in out and 'Traceback' not in out
    cells = [c for c in nbformat.read(tmp_path/'_run/12_small.ipynb', 4).cells if c.cell_type == 'code']
    assert 'STALE' not in str(cells) and cells[0].outputs and not cells[-1].outputs and cells[-1].execution_count is None
    assert not (tmp_path/'_run/times.json').exists()
    assert '_run/12_small.ipynb' in out and (tmp_path/'_run/12_small.html').exists()

def test_a_notebook_that_is_not_there(tmp_path):
    res = sh(sys.executable, str(ROOT/'.ci/lesson.py'), 'nbs/99_nothing.ipynb')
    assert res.returncode == 1 and 'there is no notebook' in res.stderr

def test_a_killed_or_failing_or_missing_notebook_fails_the_run(tmp_path):
    sys.path.insert(0, str(ROOT/'tests'))
    import run
    def nb(name, code):
        path = tmp_path/name
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
        return path
    shutil.copy(ROOT/'pyproject.toml', tmp_path); (tmp_path/'miniai').mkdir()
    run.ROOT = tmp_path
    assert run.notebook(nb('good.ipynb', '1+1'))
    assert not run.notebook(nb('bad.ipynb', 'assert False'))
    assert not run.notebook(nb('killed.ipynb', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)'))
    assert not run.notebook(tmp_path/'missing.ipynb')

@pytest.fixture
def checkout(tmp_path):
    "A small checkout with two notebooks, and what is beside them in the project"
    shutil.copytree(ROOT/'.ci', tmp_path/'.ci')
    shutil.copytree(ROOT/'tests', tmp_path/'tests', ignore=shutil.ignore_patterns('bench', '__pycache__'))
    (tmp_path/'nbs/images').mkdir(parents=True)
    (tmp_path/'nbs/images/a.png').write_bytes(b'png')
    for nm in ('01_a', '02_b'): write_nb(tmp_path/f'nbs/{nm}.ipynb', '1+1', 'two')
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b.c']
    for args in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'first']): subprocess.run([*git, *args], cwd=tmp_path, check=True)
    return tmp_path

def write_nb(path, code, *outputs):
    cell = nbformat.v4.new_code_cell(code, id='c', outputs=[nbformat.v4.new_output('stream', text=o) for o in outputs])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)

def lab(checkout): return sh(sys.executable, '.ci/lab.py', cwd=checkout).stdout

def test_make_lab_copies_and_never_writes_over_what_a_person_wrote(checkout):
    nbs,mine = checkout/'nbs',checkout/'_lab'
    assert 'newer' not in lab(checkout)
    assert {p.relative_to(mine).as_posix() for p in mine.rglob('*.*') if p.name[0] != '.'} == {'01_a.ipynb', '02_b.ipynb', 'images/a.png'}
    (mine/'01_a.ipynb').write_text('what I wrote')
    (mine/'03_mine.ipynb').write_text('my own')
    assert 'newer' not in lab(checkout) # nothing new in nbs/
    for nm in ('01_a', '02_b'): write_nb(nbs/f'{nm}.ipynb', '1+2')
    for _ in range(2): assert re.search(r'newer ones of 01_a\.ipynb;', lab(checkout))
    assert (mine/'01_a.ipynb').read_text() == 'what I wrote' and (mine/'03_mine.ipynb').read_text() == 'my own'
    assert (mine/'02_b.ipynb').read_bytes() == (nbs/'02_b.ipynb').read_bytes()
    (mine/'01_a.ipynb').rename(mine/'01_a_mine.ipynb')
    lab(checkout)
    assert (mine/'01_a.ipynb').read_bytes() == (nbs/'01_a.ipynb').read_bytes()

def test_make_lab_takes_away_only_untouched_copies_of_what_is_gone(checkout):
    lab(checkout)
    (checkout/'_lab/01_a.ipynb').write_text('what I wrote')
    for nm in ('01_a', '02_b'): (checkout/f'nbs/{nm}.ipynb').unlink()
    lab(checkout)
    assert (checkout/'_lab/01_a.ipynb').exists() and not (checkout/'_lab/02_b.ipynb').exists()

@pytest.mark.parametrize('outputs', [[], ['budget quick | device cpu']], ids=['cut short', 'quick'])
def test_make_export_takes_back_outputs_of_half_a_run_and_nothing_else(checkout, outputs):
    a,b = (checkout/f'nbs/{nm}.ipynb' for nm in ('01_a', '02_b'))
    was = a.read_bytes()
    write_nb(a, '1+1', *outputs)
    write_nb(b, '1+2', *outputs) # somebody works on this one
    changed = b.read_bytes()
    out = sh(sys.executable, '.ci/mend.py', cwd=checkout).stdout
    assert a.read_bytes() == was and b.read_bytes() == changed
    assert '01_a.ipynb had' in out and '02_b.ipynb has' in out and 'run it again' in out
    nb = nbformat.read(a, 4)
    nb.cells[0].outputs = []
    nb.cells.insert(0, nbformat.v4.new_markdown_cell('a new sentence', id='m'))
    nbformat.write(nb, a)
    sh(sys.executable, '.ci/mend.py', cwd=checkout)
    text,code = nbformat.read(a, 4).cells
    assert text.source == 'a new sentence' and code.outputs == nbformat.reads(was.decode(), 4).cells[0].outputs
    write_nb(a, '1+1', 'two, again') # a whole run
    whole = a.read_bytes()
    assert '01_a' not in sh(sys.executable, '.ci/mend.py', cwd=checkout).stdout and a.read_bytes() == whole

def test_a_notebook_of_ones_own_stays_out_of_the_tests(checkout):
    code = 'import run; print([p.stem for p in run.notebooks()])'
    def found(): return sh(sys.executable, '-c', code, cwd=checkout/'tests').stdout.strip()
    for nm in ('21_mine', 'Untitled'): write_nb(checkout/f'nbs/{nm}.ipynb', 'assert False')
    assert found() == "['01_a', '02_b']"
    shutil.rmtree(checkout/'.git') # as in an archive
    assert found() == "['01_a', '02_b', '21_mine']"

def test_ruff_finds_errors_in_tracked_notebooks_and_code(checkout):
    for nm in ('pyproject.toml', 'setup.py'): shutil.copy(ROOT/nm, checkout)
    (checkout/'miniai').mkdir()
    shutil.rmtree(checkout/'tests')
    (checkout/'tests').mkdir()
    shutil.copy(ROOT/'tests/run.py', checkout/'tests')
    def clean(): return sh(sys.executable, '-c', 'import run; print(run.lint())', cwd=checkout/'tests').stdout
    write_nb(checkout/'nbs/21_mine.ipynb', 'import os') # not tracked
    assert clean() == 'True\n'
    for path,write in ((checkout/'nbs/01_a.ipynb', write_nb), (checkout/'miniai/a.py', Path.write_text)):
        write(path, 'import os\n')
        assert 'F401' in clean() and 'False' in clean()
        write(path, '1+1\n')
    assert clean() == 'True\n'

def metadata(*argv):
    "What setup.py tells setuptools"
    code = ('import json, sys, setuptools\nsetuptools.setup = lambda **kw: print(json.dumps(kw))\n'
            f'sys.argv = ["setup.py", *{argv}]\nexec(compile(open("setup.py").read(), "setup.py", "exec"), dict(__file__="setup.py"))')
    return json.loads(sh(sys.executable, '-c', code).stdout)

def test_nbdevs_scripts_are_for_editable_installs_only():
    def names(*argv): return [o.split('=')[0] for o in metadata(*argv)['entry_points']['console_scripts']]
    assert names('bdist_wheel') == ['miniai']
    assert names('editable_wheel') == ['miniai', 'nbdev_test', 'nbdev_export', 'nbdev_clean', 'nbdev_prepare']

def test_the_readme_in_the_metadata_has_no_relative_links():
    meta = metadata('bdist_wheel')
    links = re.findall(r'\]\(([^)]+)\)', meta['long_description'])
    assert links and all(o.startswith('https://') for o in links) and '/raw/main/nbs/images/samples.png)' in meta['long_description']
    assert meta['project_urls'].keys() == {'Source', 'Issues', 'Changelog'}

BARE = dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1', MINIAI_DATA='')

def test_what_a_bug_report_needs(tmp_path):
    def about(**env): return sh(sys.executable, '-m', 'miniai', cwd=tmp_path, **BARE | env)
    res = about(MINIAI_BUDGET='quick')
    assert res.returncode == 0 and res.stderr == '' and len(res.stdout.splitlines()) <= 30
    for o in (r'^miniai .* in ', r'^Python 3\.', r'torch \d', r'^device +\w+, \d+ threads', r'^images +\S', r'^budget +quick'):
        assert re.search(o, res.stdout, re.M), o
    res = about(MINIAI_DATA=str(tmp_path), MINIAI_BUDGET='lots')
    assert res.returncode == 0 and 'no IDX files' in res.stdout and "MINIAI_BUDGET is 'lots'" in res.stdout

def test_the_source_of_the_images_is_named_without_loading_it(tmp_path, monkeypatch):
    import datasets, miniai.fashion
    from miniai.__main__ import images
    monkeypatch.delenv('MINIAI_DATA', raising=False)
    monkeypatch.setattr(miniai.fashion, 'idx_folders', lambda: [tmp_path])
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')
    monkeypatch.setattr(miniai.fashion, 'hub_reachable', lambda timeout: True)
    assert images().startswith('the hub (')
    monkeypatch.setattr(miniai.fashion, 'hub_reachable', lambda timeout: False)
    assert 'drawn' in images()
    (tmp_path/'cache/zalando-datasets___fashion_mnist').mkdir(parents=True)
    assert images().startswith("the hub's cache")
    (tmp_path/'train-images-idx3-ubyte').touch()
    assert images() == str(tmp_path)

def test_the_readmes_example_runs(tmp_path):
    example,callback = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(encoding='utf-8'), re.S)
    assert len(example.splitlines()) <= 15
    code = (example+callback).replace('learn.fit(3', 'learn.fit(1')
    res = sh(sys.executable, '-c', code, cwd=tmp_path, MINIAI_BUDGET='quick', PYTHONPATH=str(ROOT))
    assert res.returncode == 0, res.stderr
    assert re.search(r'accuracy', res.stdout)

def test_the_readme_links_to_what_is_there():
    for link in re.findall(r'\]\(([^)#]+)', (ROOT/'README.md').read_text(encoding='utf-8')):
        assert link.startswith('http') or (ROOT/link).exists(), link
