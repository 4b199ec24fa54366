"""Run lesson notebooks from top to bottom with a live progress line, and leave the results in _run/.

python .ci/lesson.py nbs/12_ddpm.ipynb [more notebooks]
"""
import argparse, asyncio, html, os, re, shutil, signal, sys, time, warnings
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

def plain(s): return ' '.join(html.unescape(re.sub(r'<[^>]+>', ' ', s)).split())

class Lesson(NotebookClient):
    "A notebook that is being run: its prints and progress bars are shown as they come"
    def __init__(self, path, live):
        super().__init__(nbformat.read(path, as_version=4), timeout=None, kernel_name='python3',
                         extra_arguments=['--log-level=ERROR'], resources={'metadata': {'path': str(path.parent)}})
        self.live,self.rows,self.title,self.interrupted = live,0,'',False

    async def async_execute_cell(self, cell, index, **kwargs):
        if cell.cell_type == 'markdown':
            if heading := re.search(r'^#+ (.*)', cell.source, re.M): self.title = heading[1]
        self.rows = 0
        if self.live.tty: self.live.status(f'[{index+1}/{len(self.nb.cells)}] {self.title}')
        return await super().async_execute_cell(cell, index, **kwargs)

    def process_message(self, msg, cell, cell_index):
        content = msg['content']
        if msg['msg_type'] == 'stream' and (text := content['text'].strip()) and (content['name'] == 'stdout' or 'Warning' in text):
            for line in text.splitlines(): self.live.line(line)
        elif msg['msg_type'] in ('display_data', 'update_display_data'): self.bars(content['data'].get('text/html', ''))
        return super().process_message(msg, cell, cell_index)

    def bars(self, markup):
        "What `fastprogress` shows: finished rows of its table, then the bars"
        rows = re.findall(r'<tr.*?</tr>', markup, re.S)
        for row in rows[self.rows:]: self.live.line('  '.join(f'{plain(o):>9}' for o in re.findall(r'<t[hd].*?</t[hd]>', row, re.S)))
        self.rows = max(self.rows, len(rows))
        if text := ' | '.join(plain(o) for o in re.findall(r'</progress>\s*([^<]+)', markup) if plain(o)): self.live.status(f'{self.title}: {text}')

    def interrupt(self):
        "Ctrl-C goes to the cell that runs, in place of nbclient's own answer, which is to kill the kernel"
        self.interrupted = True
        if self.km is not None: os.kill(self.km.provisioner.pid, signal.SIGINT)

def run(path):
    "Run one notebook; returns what to say about how it ended, or `None` if it ended well"
    live = Live()
    lesson = Lesson(path, live)
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
    # glibc gives large blocks back to the system in each training step and asks for them again in the next: keep them, which saves a CPU a tenth of the time
    keep = dict(MALLOC_MMAP_THRESHOLD_=1 << 32, MALLOC_TRIM_THRESHOLD_=1 << 32, MALLOC_TOP_PAD_=1 << 28)
    for k,v in keep.items(): os.environ.setdefault(k, str(v))
    start,problem = time.time(),None
    for p in paths:
        print(f'miniai: running {p.relative_to(ROOT)}', flush=True)
        if problem := run(p): break
    print(f'miniai: {p.name} {problem}' if problem else 'miniai: done', f'after {int(time.time()-start)//60}:{int(time.time()-start)%60:02d} min')
    made = sorted(p for p in OUT.rglob('*') if p.is_file() and p.stat().st_mtime >= start)
    print('Made in this run:' if made else 'Nothing was made.')
    for p in made: print(f'  {p.relative_to(ROOT)}  {p.stat().st_size/1000:,.0f} kB')
    sys.exit(130 if problem and problem.startswith('interrupted') else 1 if problem else 0)

if __name__ == '__main__': main()
