"Take back the outputs of a run that broke off or was a quick one, where the code is still that of git's HEAD."
import json, subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def git(*args): return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
def code(nb): return [(c['cell_type'], ''.join(c['source'])) for c in nb['cells']]

def half_run(nb, old):
    "Outputs with an error or of the quick budget, or none where there were some?"
    pairs = [(c['outputs'], o['outputs']) for c,o in zip(nb['cells'], old['cells']) if c['cell_type'] == 'code']
    outputs = [o for now,_ in pairs for o in now]
    return ('budget quick' in json.dumps(outputs) or any(o['output_type'] == 'error' for o in outputs)
            or any(was and not now for now,was in pairs))

def main():
    for nm in git('diff', '--name-only', 'HEAD', '--', 'nbs/[0-9]*.ipynb').stdout.splitlines():
        path,old = ROOT/nm,git('show', f'HEAD:{nm}').stdout
        if not (path.exists() and old): continue
        nb,was = json.loads(path.read_text(encoding='utf-8')),json.loads(old)
        if code(nb) == code(was) and half_run(nb, was):
            path.write_text(old, encoding='utf-8')
            print(f'miniai: {nm} had outputs of a run that was cut short or quick; it is as in git again')

if __name__ == '__main__': main()
