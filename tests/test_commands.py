"The commands around the notebooks: make, set-up, the lesson runner, and the README's example"
import os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat, pytest

ROOT = Path(__file__).resolve().parent.parent

def sh(*args, cwd=ROOT, **env): return subprocess.run(args, cwd=cwd, text=True, capture_output=True, env=os.environ | env)

def test_make_alone_lists_every_command():
    out = sh('make').stdout
    for target in 'help setup demo test lessons data bench docs lab clean'.split(): assert re.search(rf'^make {target} +\S', out, re.M), target

@pytest.fixture
def project(tmp_path):
    "The set-up script in a folder of its own, and a PATH with nothing but what it is given"
    shutil.copytree(ROOT/'.ci', tmp_path/'.ci')
    (tmp_path/'bin').mkdir()
    for tool in ('rm', 'tail', 'dirname'): (tmp_path/'bin'/tool).symlink_to(shutil.which(tool))
    return tmp_path

def test_no_python_gets_one_line(project):
    res = sh('/bin/sh', '.ci/setup.sh', 'demo', cwd=project, PATH=str(project/'bin'))
    assert res.returncode == 1 and not (project/'.venv').exists()
    assert res.stderr == 'miniai: needs Python 3.11 or newer. Install it, or name it: make PYTHON=/path/to/python3.12 demo\n'

def test_an_old_python_is_passed_over(project):
    for nm in ('python3', 'python'): (project/'bin'/nm).write_text('#!/bin/sh\nexit 1\n'); (project/'bin'/nm).chmod(0o755)
    assert 'needs Python 3.11' in sh('/bin/sh', '.ci/setup.sh', 'demo', cwd=project, PATH=str(project/'bin')).stderr

def test_no_venv_gets_one_line(project):
    (project/'bin/python3').write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "No module named venv" >&2\nexit 1\n')
    (project/'bin/python3').chmod(0o755)
    res = sh('/bin/sh', '.ci/setup.sh', 'demo', cwd=project, PATH=str(project/'bin'))
    assert res.returncode == 1 and len(res.stderr.splitlines()) == 1 and 'python3-venv' in res.stderr and 'No module named venv' in res.stderr

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

CELLS = ["# A lesson", "import os, torch\nfrom torch import nn\nfrom miniai.training import out_dir\nfrom miniai.datasets import DataLoaders\n"
         "from miniai.learner import *\nprint('budget line')",
         "batches = [(torch.randn(4,2), torch.randn(4,1))]*SIZE\n"
         "TrainLearner(nn.Linear(2,1), DataLoaders(batches, []), nn.MSELoss(), cbs=[MetricsCB(), ProgressCB()]).fit(2, valid=False)",
         "(out_dir()/'result.txt').write_text('made')"]

@pytest.fixture
def lesson(tmp_path):
    "The runner beside a small notebook, as in the project"
    def make(*changes):
        cells = list(CELLS)
        for a,b in changes: cells = [c.replace(a, b) for c in cells]
        for d in ('.ci', 'nbs'): (tmp_path/d).mkdir()
        shutil.copy(ROOT/'.ci/lesson.py', tmp_path/'.ci')
        nb = nbformat.v4.new_notebook(cells=[(nbformat.v4.new_markdown_cell if c[0] == '#' else nbformat.v4.new_code_cell)(c) for c in cells])
        nbformat.write(nb, tmp_path/'nbs/12_small.ipynb')
        env = {k: v for k,v in os.environ.items() if k != 'IN_TEST'} | dict(PYTHONPATH=str(ROOT))
        return subprocess.Popen([sys.executable, '.ci/lesson.py', 'nbs/12_small.ipynb'], cwd=tmp_path, text=True, env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return make

def test_a_lesson_shows_its_progress_and_leaves_its_results(lesson, tmp_path):
    out,_ = (proc := lesson(('SIZE', '3'))).communicate(timeout=120)
    assert proc.returncode == 0, out
    assert 'budget line' in out and re.search(r'epoch +train +loss', out) and re.search(r'^ +1 +train +\d', out, re.M)
    assert '[0/2 ' in out and 'miniai: done' in out
    run = tmp_path/'_run'
    assert (run/'result.txt').read_text() == 'made' and '<table' in (run/'12_small.html').read_text(encoding='utf-8')
    assert any('budget line' in str(c.get('outputs')) for c in nbformat.read(run/'12_small.ipynb', 4).cells)
    assert '_run/result.txt' in out

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

def test_the_readmes_example_runs(tmp_path):
    example,callback = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(encoding='utf-8'), re.S)
    assert len(example.splitlines()) <= 15
    code = example.replace('learn.fit(3)', 'learn.fit(1)') + callback
    res = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, text=True, capture_output=True, env=os.environ | dict(MINIAI_BUDGET='quick', PYTHONPATH=str(ROOT)))
    assert res.returncode == 0, res.stderr
    assert re.search(r'accuracy', res.stdout)

def test_the_readme_links_to_what_is_there():
    for link in re.findall(r'\]\(([^)#]+)', (ROOT/'README.md').read_text(encoding='utf-8')):
        assert link.startswith('http') or (ROOT/link).exists(), link
