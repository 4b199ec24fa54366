"Copies of the notebooks in _lab/, to change as one likes. What a person changed there is never written over."
import json, shutil
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS,LAB = ROOT/'nbs',ROOT/'_lab'
COPIED = LAB/'.copied.json' # path → hash of what was copied there

def hashed(path): return sha256(path.read_bytes()).hexdigest() if path.is_file() else None

def main():
    LAB.mkdir(exist_ok=True)
    copied = json.loads(COPIED.read_text()) if COPIED.exists() else {}
    sources = {p.relative_to(NBS).as_posix(): hashed(p) for g in ('[0-9]*.ipynb', 'images/*') for p in sorted(NBS.glob(g)) if p.is_file()}
    for nm in copied.keys() - sources.keys(): # gone from nbs/
        if hashed(LAB/nm) == copied.pop(nm): (LAB/nm).unlink()
    stay = []
    for nm,new in sources.items():
        here,was = hashed(LAB/nm),copied.get(nm)
        if here not in (None, was, new): # changed by a person
            if new != was: stay.append(nm)
            continue
        (LAB/nm).parent.mkdir(exist_ok=True)
        if here != new: shutil.copyfile(NBS/nm, LAB/nm)
        copied[nm] = new
    COPIED.write_text(json.dumps(copied, indent=1))
    print('miniai: _lab/ holds your copies of the notebooks; those in nbs/ stay as they are')
    if stay:
        print(f'miniai: nbs/ has newer ones of {", ".join(stay)}; you changed your copies, so they stay. '
              'Rename yours and run make lab again to get the new version')

if __name__ == '__main__': main()
