"""Run lesson notebooks from top to bottom with a live progress line, and leave the results in _run/.

python .ci/lesson.py nbs/12_ddpm.ipynb [more notebooks]
"""
import argparse, asyncio, html, json, os, re, shutil, signal, sys, time, warnings
from pathlib import Path

warnings.filterwarnings('ignore', category=DeprecationWarning)
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT/'_run'

class Live:
    "One line that is written over and over on a terminal; elsewhere a new line, but at most every half a minute"
    def __init__(self): self.tty,self.shown,self.text = sys.stdout.isatty(),0.,''
    def status(self, text):
        self.text = text
        if self.tty: print(f'\r\x1b[K{text[:shutil.get_terminal_size().columns-1]}', end='', flush=True)
        elif time.monotonic()-self.shown > 30: print(text, flush=True); self.shown = time.monotonic()
    def line(self, text):
        print(f'\r\x1b[K{text}' if self.tty else text, flush=True)
        if self.tty and self.text: self.status(self.text)
    def clear(self):
        if self.tty: print('\r\x1b[K', end='', flush=True)
        self.text = ''

class Clock:
    "Time left, from what each cell took last time: in a whole run here, or else on the two cores where .ci/times.json was measured"
    def __init__(self, paths):
        self.stems,self.took,self.past,self.budget,self.cell,self.start = {p.stem for p in paths},{},{},'','',0.
        for p in (ROOT/'.ci/times.json', OUT/'times.json'):
            if p.exists():
                for k,v in json.loads(p.read_text()).items(): self.past.setdefault(k, {}).update(v)

    def begin(self, cell): self.cell,self.start = cell,time.monotonic()
    def end(self): self.took[self.cell],self.cell = time.monotonic()-self.start,''
    def left(self):
        "In words; nothing where a notebook's times are not known for this budget"
        past = {k: v for k,v in self.past.get(self.budget, {}).items() if k.split('/')[0] in self.stems}
        if self.stems - {k.split('/')[0] for k in past}: return ''
        done = sum(past.get(k, 0) for k in self.took)
        rate = (sum(self.took.values())+30)/(done+30) # this machine's against that one's; half a minute holds it near 1 at first
        now = max(rate*past.get(self.cell, 0) - (time.monotonic()-self.start), 0)
        secs = now + rate*sum(v for k,v in past.items() if k not in self.took and k != self.cell)
        return f', about {secs/60:.0f} min left' if secs >= 60 else ', less than a minute left'

    def save(self):
        self.past.setdefault(self.budget, {}).update({k: round(v, 1) for k,v in self.took.items()})
        (OUT/'times.json').write_text(json.dumps(self.past, indent=1))

def plain(s): return ' '.join(html.unescape(re.sub(r'<[^>]+>', ' ', s)).split())

class Lesson(NotebookClient):
    "A notebook that is being run: its prints and progress bars are shown as they come"
    def __init__(self, path, live, clock):
        super().__init__(nbformat.read(path, as_version=4), timeout=None, kernel_name='python3',
                         extra_arguments=['--log-level=ERROR'], resources={'metadata': {'path': str(path.parent)}})
        for c in self.nb.cells: # what is in _run/ is of this run
            if c.cell_type == 'code': c.update(outputs=[], execution_count=None)
        self.live,self.clock,self.stem,self.rows,self.title,self.interrupted = live,clock,path.stem,0,'',False

    async def async_execute_cell(self, cell, index, **kwargs):
        where = f'[{index+1}/{len(self.nb.cells)}]'
        if cell.cell_type == 'markdown' and (heading := re.search(r'^#+ (.*)', cell.source, re.M)):
            self.title = heading[1]
            self.live.line(f'{where} {self.title}{self.clock.left()}')
        self.rows = 0
        if self.live.tty: self.live.status(f'{where} {self.title}{self.clock.left()}')
        if cell.cell_type != 'code': return await super().async_execute_cell(cell, index, **kwargs)
        self.clock.begin(f'{self.stem}/{cell.get("id", index)}')
        res = await super().async_execute_cell(cell, index, **kwargs)
        self.clock.end()
        return res

    def process_message(self, msg, cell, cell_index):
        content = msg['content']
        if msg['msg_type'] == 'stream' and (text := content['text'].strip()) and (content['name'] == 'stdout' or 'Warning' in text):
            if budget := re.search(r'^budget (\w+) ', text, re.M): self.clock.budget = budget[1]
            for line in text.split('\n'): self.live.line(line.split('\r')[-1])
        elif msg['msg_type'] in ('display_data', 'update_display_data'): self.bars(content['data'].get('text/html', ''))
        return super().process_message(msg, cell, cell_index)

    def bars(self, markup):
        "What `fastprogress` shows: finished rows of its table, then the bars"
        rows = re.findall(r'<tr.*?</tr>', markup, re.S)
        for row in rows[self.rows:]:
            self.live.line('  '.join(f'{plain(o):>9}' for o in re.findall(r'<t[hd].*?</t[hd]>', row, re.S)))
        self.rows = max(self.rows, len(rows))
        text = ' | '.join(plain(o) for o in re.findall(r'</progress>\s*([^<]+)', markup) if plain(o))
        if text: self.live.status(f'{self.title}{self.clock.left()}: {text}')

    def interrupt(self):
        "Ctrl-C goes to the cell that runs, in place of nbclient's own answer, which is to kill the kernel"
        self.interrupted = True
        if self.km is not None: os.kill(self.km.provisioner.pid, signal.SIGINT)

def run(path, clock):
    "Run one notebook; returns what to say about how it ended, or `None` if it ended well"
    live = Live()
    lesson = Lesson(path, live, clock)
    lesson.on_notebook_start = lambda **kw: asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lesson.interrupt)
    problem = None
    try: lesson.execute()
    except CellExecutionError as e:
        problem = f'interrupted in "{lesson.title}"' if lesson.interrupted else f'failed in "{lesson.title}":\n{e}'
    except DeadKernelError: problem = f'ended in "{lesson.title}": the kernel died, perhaps for lack of memory'
    live.clear()
    nbformat.write(lesson.nb, OUT/path.name)
    (OUT/f'{path.stem}.html').write_text(HTMLExporter().from_notebook_node(lesson.nb)[0], encoding='utf-8')
    return problem

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('notebooks', nargs='+', type=Path)
    paths = [p.resolve() for p in parser.parse_args().notebooks]
    for p in paths:
        if not p.exists(): sys.exit(f'miniai: there is no notebook {p}')
    OUT.mkdir(exist_ok=True)
    os.environ.update(MINIAI_OUT=str(OUT), PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    # glibc gives large blocks back to the system in each training step and asks for them again in the next: keep them,
    # which saves a CPU a tenth of the time
    keep = dict(MALLOC_MMAP_THRESHOLD_=1 << 32, MALLOC_TRIM_THRESHOLD_=1 << 32, MALLOC_TOP_PAD_=1 << 28)
    for k,v in keep.items(): os.environ.setdefault(k, str(v))
    start,clock,problem = time.time(),Clock(paths),None
    for p in paths:
        print(f'miniai: running {p.relative_to(ROOT)}', flush=True)
        if problem := run(p, clock): break
    if not problem: clock.save()
    took = int(time.time()-start)
    print(f'miniai: {p.name} {problem}' if problem else 'miniai: done', f'after {took//60}:{took%60:02d} min')
    made = sorted(p for p in OUT.rglob('*') if p.is_file() and p.stat().st_mtime >= start)
    print('Made in this run:' if made else 'Nothing was made.')
    for p in made: print(f'  {p.relative_to(ROOT)}  {p.stat().st_size/1000:,.0f} kB')
    sys.exit(130 if problem and problem.startswith('interrupted') else 1 if problem else 0)

if __name__ == '__main__': main()
