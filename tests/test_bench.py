"The script that runs everything on a GPU, tried without one: time limits, results that outlast an interruption"
import importlib.util, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat, pytest

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture
def project(tmp_path):
    "The scripts in a project of their own"
    for d in ('tests/bench', 'nbs', 'miniai'): (tmp_path/d).mkdir(parents=True)
    for p in ('tests/bench/cuda.py', 'tests/bench/cuda.sh', 'pyproject.toml'): shutil.copy(ROOT/p, tmp_path/p)
    return tmp_path

@pytest.fixture
def cuda(project):
    spec = importlib.util.spec_from_file_location('cuda_runner', project/'tests/bench/cuda.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.LOGS.mkdir(parents=True)
    return module

def test_results_outlast_an_interruption(project):
    for name,code in dict(good='print(6*7)', bad='assert 6*7 == 41', hangs='import time; time.sleep(600)').items():
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), project/f'nbs/10_{name}.ipynb')
    out = project/'out'
    proc = subprocess.Popen([sys.executable, 'tests/bench/cuda.py', str(out)], cwd=project, text=True, stdout=subprocess.PIPE,
                            env=os.environ | dict(DEVICE='cpu', CUDA_VISIBLE_DEVICES='', TESTS='', WORKERS='3'))
    lines = [proc.stdout.readline() for _ in range(3)] # the machine, and two results
    known = json.loads((out/'summary.json').read_text())
    assert not known['complete']
    assert {k: v['result'] for k,v in known['jobs'].items()} == {'nbs/10_good.ipynb': 'passed', 'nbs/10_bad.ipynb': 'failed'}
    proc.send_signal(signal.SIGTERM)
    lines += proc.communicate(timeout=30)[0].splitlines(keepends=True)
    known = json.loads((out/'summary.json').read_text())
    assert proc.returncode == 1 and not known['complete'] and known['jobs']['nbs/10_hangs.ipynb']['result'] == 'stopped'
    assert (out/'summary.txt').read_text() == ''.join(lines) and '1 passed, 1 failed, 0 timed out, 1 stopped' in lines[-1]
    assert 'assert 6*7 == 41' in (out/'logs.txt').read_text() and 'torch' in known['machine']

def test_a_time_limit_ends_a_job_and_what_it_started(cuda, project, capsys):
    (project/'slow.py').write_text('''
import subprocess, time
print(subprocess.Popen(['sleep', '600']).pid, flush=True)
time.sleep(600)
''')
    (out := project/'out').mkdir()
    summary = cuda.Summary(out)
    cuda.Runner(summary).run('slow', ['slow.py'], 3)
    assert summary.jobs['slow']['result'] == 'timed out' and not summary.end()
    child = int((cuda.LOGS/'slow.log').read_text())
    for _ in range(50):
        state = subprocess.run(['ps', '-o', 'stat=', '-p', str(child)], text=True, capture_output=True).stdout.strip()
        if not state or state.startswith('Z'): break
        time.sleep(.1)
    else: pytest.fail('what it started still runs')

def test_no_time_left_and_no_notebook_are_no_success(cuda, project, monkeypatch, capsys):
    (out := project/'out').mkdir()
    runner = cuda.Runner(summary := cuda.Summary(out))
    monkeypatch.setattr(cuda, 'NOTEBOOK', 'pass')
    runner.run('nothing said', ['-c', 'pass'], 60)
    monkeypatch.setenv('LIMIT', '0')
    runner.run('too late', ['-c', 'print("Success.")'], 60)
    assert {k: v['result'] for k,v in summary.jobs.items()} == {'nothing said': 'failed', 'too late': 'stopped'}

def test_no_python_gets_one_line(project):
    (project/'bin').mkdir()
    for tool in ('bash', 'dirname', 'ls'): (project/'bin'/tool).symlink_to(shutil.which(tool))
    res = subprocess.run(['bash', 'tests/bench/cuda.sh'], cwd=project, text=True, capture_output=True, env=dict(PATH=str(project/'bin')))
    assert res.returncode == 1 and len(res.stderr.splitlines()) == 1 and 'cuda_wheels.sh' in res.stderr

def test_the_scripts_are_bash():
    for p in (ROOT/'tests/bench').glob('*.sh'): assert subprocess.run(['bash', '-n', str(p)]).returncode == 0, p
