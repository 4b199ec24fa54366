"What cuda.sh, which says how it is used, runs once it has found a Python: one process a job, side by side, each with a time limit"
import glob, json, os, platform, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT/'_run'/'cuda'/'logs'
NOTEBOOK = 'import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1], n_workers=0)'
START = time.monotonic()

def setting(name, default): return type(default)(os.environ.get(name, default))
def found(name, default): return sorted(p for pattern in setting(name, default).split() for p in glob.glob(pattern))
def left(): return setting('LIMIT', 690) - (time.monotonic()-START)

def machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(gpu=gpu, torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count())

class Summary:
    "Results in `out`, written at once: a limit from outside loses only what still runs"
    def __init__(self, out):
        self.out,self.lock,self.jobs = out,threading.Lock(),{}
        self.machine = machine()
        for nm in ('summary.txt', 'logs.txt'): (out/nm).write_text('')
        self.say(', '.join(f'{k} {v}' for k,v in self.machine.items()))
        self.save()

    def say(self, line):
        print(line, flush=True)
        with open(self.out/'summary.txt', 'a', encoding='utf-8') as f: f.write(f'{line}\n')

    def save(self, complete=False):
        text = json.dumps(dict(machine=self.machine, complete=complete, seconds=round(time.monotonic()-START), jobs=self.jobs), indent=1)
        (self.out/'new.json').write_text(text); (self.out/'new.json').replace(self.out/'summary.json')

    def add(self, name, result, seconds, log):
        with self.lock:
            self.jobs[name] = dict(result=result, seconds=round(seconds, 1))
            text = log.read_text(encoding='utf-8', errors='replace') if log.exists() else ''
            with open(self.out/'logs.txt', 'a', encoding='utf-8') as f: f.write(f'{"="*20} {result} {name}\n{text[-50_000:]}\n')
            self.save()
            self.say(f'{result:9} {name} {seconds:.0f} s')

    def end(self):
        results = [o['result'] for o in self.jobs.values()]
        counts = {r: results.count(r) for r in ('passed', 'failed', 'timed out', 'stopped')}
        self.say(f'{", ".join(f"{n} {r}" for r,n in counts.items())} after {time.monotonic()-START:.0f} s')
        self.save(complete='stopped' not in results)
        return results.count('passed') == len(results) > 0

class Runner:
    def __init__(self, summary): self.summary,self.running,self.stopped = summary,set(),False

    def run(self, name, args, limit, **env):
        "Run one job; its log is in LOGS from its first line on"
        log,start = LOGS/f'{Path(name).stem}.log',time.monotonic()
        limit = min(limit, left())
        if self.stopped or limit < 1: return self.summary.add(name, 'stopped', 0., LOGS/'none')
        with open(log, 'wb') as f:
            proc = subprocess.Popen([sys.executable, *args], cwd=ROOT, env=os.environ | env, process_group=0,
                                    stdout=f, stderr=subprocess.STDOUT)
        self.running.add(proc)
        try: result = 'passed' if proc.wait(limit) == 0 else 'failed'
        except subprocess.TimeoutExpired: result = 'timed out'
        kill(proc) # and what it started
        self.running.discard(proc)
        if args[:2] == ['-c', NOTEBOOK] and result == 'passed' and 'Success.' not in log.read_text(errors='replace'):
            result = 'failed' # there was no notebook
        self.summary.add(name, 'stopped' if self.stopped else result, time.monotonic()-start, log)

    def stop(self, *_):
        self.stopped = True
        for proc in list(self.running): kill(proc)

def kill(proc):
    try: os.killpg(proc.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    proc.wait()

def longest_first(path):
    "Later notebooks train more, and 90 and what follows it belong to no lesson"
    number = Path(path).name[:2]
    return '' if number >= '90' else number

def main():
    out = Path(sys.argv[1]).resolve()
    for d in (out, LOGS): d.mkdir(parents=True, exist_ok=True)
    for p in LOGS.glob('*.log'): p.unlink()
    os.chdir(ROOT)
    cuda = setting('DEVICE', 'cuda') == 'cuda'
    if cuda and not torch.cuda.is_available(): sys.exit('there is no CUDA GPU here; DEVICE=cpu tries this script without one')
    notebooks = sorted(found('NOTEBOOKS', 'nbs/[0-9]*.ipynb'), key=longest_first, reverse=True)
    env = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', MPLBACKEND='agg', HF_HUB_OFFLINE='1', PYTHONUNBUFFERED='1')
    summary = Summary(out)
    runner = Runner(summary)
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(sig, runner.stop)
    with ThreadPoolExecutor(setting('WORKERS', os.cpu_count() or 1)) as pool:
        each = setting('EACH', 300)
        jobs = [(p, ['-c', NOTEBOOK, p]) for p in notebooks]
        jobs += [(p, ['-m', 'pytest', '-p', 'no:cacheprovider', p]) for p in found('TESTS', 'tests/test_*.py')]
        for o in [pool.submit(runner.run, *job, each, **env) for job in jobs]: o.result()
    if cuda and setting('GPU', '1'): # alone, since it measures
        runner.run('gpu.py', ['tests/bench/gpu.py', '--out', str(out)], left(), **env)
    sys.exit(not summary.end())

if __name__ == '__main__': main()
