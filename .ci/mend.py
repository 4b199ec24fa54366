"Put back the committed outputs of notebooks whose last run failed, was a quick one or left none, where no code changed since."
import json, subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def git(*args): return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
def code_cells(nb): return [c for c in nb['cells'] if c['cell_type'] == 'code']

def half_run(now, was):
    "Outputs with an error or of the quick budget, or none where there were some?"
    outputs = [o for c in now for o in c['outputs']]
    return ('budget quick' in json.dumps(outputs) or any(o['output_type'] == 'error' for o in outputs)
            or any(w['outputs'] and not n['outputs'] for n,w in zip(now, was)))

def main():
    for nm in git('diff', '--name-only', 'HEAD', '--', 'nbs/[0-9]*.ipynb').stdout.splitlines():
        path,old = ROOT/nm,git('show', f'HEAD:{nm}').stdout
        if not (path.exists() and old): continue
        nb = json.loads(path.read_text(encoding='utf-8'))
        now,was = code_cells(nb),code_cells(json.loads(old))
        if not half_run(now, was): continue
        if [c['source'] for c in now] != [c['source'] for c in was]:
            print(f'miniai: {nm} has missing, failed or quick outputs, and its code changed: run it again, whole')
            continue
        for n,w in zip(now, was): n.update({k: w[k] for k in ('outputs', 'execution_count', 'metadata')})
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)+'\n', encoding='utf-8')
        print(f'miniai: {nm} had missing, failed or quick outputs; those in git are back')

if __name__ == '__main__': main()
