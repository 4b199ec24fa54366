"Gathers the website's pages for mkdocs: README, each notebook without nbdev's directives, a page for each module, and .github's papers"
import json, logging, re, shutil
from collections import Counter
from operator import itemgetter
from pathlib import Path
from mkdocs.exceptions import Abort

logging.getLogger('mkdocs').setLevel(logging.WARNING) # mkdocs' own --quiet would hide warnings from --strict

root = Path(__file__).resolve().parents[1]
directive = re.compile(r'^#\|\s*(.*)\n?', re.M)
code = re.compile(r'```.*?```|`[^`]*`|\$[^$]*\$', re.S)
heading = re.compile(r'^#+ .*', re.M)
link = re.compile(r'(\]\(|\b(?:src|href)=")(?![a-z]+:|[#/])([^)"\s#]+)')
md_link = re.compile(r'(?<!!)\[([^][]*)\]\((?![a-z]+:|[#/])([^)\s#]+)\)')

def on_config(config):
    docs = Path(config.docs_dir)

    def write(to, text):
        (docs/to).parent.mkdir(parents=True, exist_ok=True)
        (docs/to).write_text(text, encoding='utf-8')
        return to

    def place(page, text):
        "Bring along the files that `page` links to; a folder, which a site cannot show, loses its link"
        text = md_link.sub(lambda m: m[1] if (page.parent/m[2]).is_dir() else m[0], text)
        for _,to in link.findall(code.sub('', text)):
            f = (page.parent/to).resolve()
            if not f.is_file(): raise Abort(f'{page.name} links to {to}, which is not there')
            dest = docs/f.relative_to(root)
            dest.parent.mkdir(parents=True, exist_ok=True)
            if f.suffix not in ('.ipynb', '.md'): shutil.copy(f, dest)
        return text

    def in_html(m):
        "A link as it is on the site, where mkdocs does not see it"
        return m[0].replace('README.md', 'index.md').replace('.github/', '').replace('.md', '.html').replace('.ipynb', '.html')

    def notebook(page):
        nb = json.loads(page.read_text(encoding='utf-8'))
        cells,nb['cells'] = nb['cells'],[]
        for cell in cells:
            text = ''.join(cell['source'])
            if cell['cell_type']=='code':
                said = directive.findall(text)
                if any(re.match(r'hide$|default_exp|include:\s*false', o) for o in said): continue
                if 'code-fold: true' in said: cell['metadata']['tags'] = ['fold']
                text = directive.sub('', text).strip('\n')
            else:
                text = link.sub(in_html, place(page, text))
                # mkdocs-jupyter leaves code between backticks out of its table of contents, which then links nowhere
                text = heading.sub(lambda m: re.sub('`(.+?)`', r'<code>\1</code>', m[0]), text)
            nb['cells'].append({**cell, 'source': text})
        return write(f'nbs/{page.name}', json.dumps(nb))

    def paper(page):
        "A page of the repository, which stands at the top of the site"
        text = place(page, page.read_text(encoding='utf-8'))
        return write(page.name, link.sub(lambda m: m[0].replace('../', '').replace('.github/', ''), text))

    def reference(module):
        "Its notebooks, of which the first orders the modules, and its page"
        nbs = sorted(set(re.findall(r'^# %% \.\./(nbs/.+\.ipynb)', module.read_text(encoding='utf-8'), re.M)))
        if not nbs: raise Abort(f'{module.name} names no notebook that it comes from')
        links = ', '.join(f'[{Path(nb).stem}](../{nb})' for nb in nbs)
        name = f'miniai.{module.stem}'
        return nbs,{module.stem: write(f'api/{module.stem}.md', f'# {name}\n\nExplained in {links}\n\n::: {name}\n')}

    modules = [p for p in (root/'miniai').glob('[!_]*.py') if p.stem != 'imports'] # which only repeats the others
    config.nav = [{'Home': paper(root/'README.md')},
                  {'Notebooks': [notebook(p) for p in sorted((root/'nbs').glob('[0-9]*.ipynb'))]},
                  {'Reference': [page for _,page in sorted(map(reference, modules), key=itemgetter(0))]},
                  {'Contributing': paper(root/'.github'/'CONTRIBUTING.md')},
                  {'Changes': paper(root/'.github'/'CHANGELOG.md')}]
    for f in ('docs.css', 'docs.js'): write(f'assets/{f}', (root/'.ci'/f).read_text(encoding='utf-8'))
    return config

def on_page_content(html, **kwargs):
    "Mends what mkdocs-jupyter writes"
    # it sets up MathJax 2 in each notebook, which MathJax 3 trips over
    html = re.sub(r'<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->', '', html, flags=re.S)
    # it repeats all code for its copy buttons, and search would find it twice
    html = re.sub('class="(clipboard-copy-txt|notice)"', r'\g<0> data-search-exclude', html)
    # it gives equal headings one id, where its table of contents counts them
    seen = Counter()
    def count(m):
        seen[m[2]] += 1
        return m[0] if seen[m[2]]==1 else f'{m[1]}{m[2]}_{seen[m[2]]-1}'
    return re.sub('(<h[1-6] id=")([^"]+)', count, html)
