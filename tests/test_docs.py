"The website's reference, and the papers for contributors: what they say is what the code does"
import importlib, pkgutil, re
from pathlib import Path

import pytest

import miniai
from miniai.learner import Callback

ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = (ROOT/'.github'/'CONTRIBUTING.md').read_text(encoding='utf-8')

@pytest.fixture
def visit(monkeypatch):
    "The package `pkg` that griffe makes of these modules, with docments"
    griffe = pytest.importorskip('griffe', reason='the extra docs is not installed: make docs brings it')
    monkeypatch.syspath_prepend(str(ROOT/'.ci'))
    docments = importlib.import_module('docments')
    def make(**modules):
        files,extensions = {f'{k}.py': v for k,v in modules.items()},griffe.load_extensions(docments.Docments)
        with griffe.temporary_visited_package('pkg', files, extensions=extensions) as pkg: return pkg
    return make

def said(obj):
    "What docstring and docments say of `obj`"
    res = dict(text=obj.docstring.value, params={}, fields={}, more=[])
    for s in obj.docstring.parsed:
        if key := dict(parameters='params', attributes='fields').get(s.kind.value): res[key] |= {o.name: o.description for o in s.value}
        elif s.value != obj.docstring.value: res['more'].append(s.value)
    return res

def test_a_function(visit):
    f = visit(a='''
@decorated # nobody's
def f(
    # a line of its own
    x: int, # the x
    y=1, *args, # both
    z: str='#', # not a comment in a string
) -> float: # (n,)
    "Does it"
    return x # no docment
''')['a.f']
    params = {'x': 'the x', 'y, args': 'both', 'z': 'not a comment in a string'}
    assert said(f) == dict(text='Does it', params=params, fields={}, more=['**Returns:** (n,)'])

def test_a_docment_without_a_docstring_is_shown(visit):
    a = visit(a='''
def f(x): # the x
    return x
def g(x):
    return x # no docment
def h(x) -> int: # as fastcore reads it
    return x
''')['a']
    assert said(a['f'])['params'] == {'x': 'the x'} and a['g'].docstring is None
    assert said(a['h'])['params'] == {} and said(a['h'])['more'] == ['**Returns:** as fastcore reads it']

def test_a_function_on_one_line(visit):
    a = visit(a='def f(x): return x # what it is\ndef g(x): "Said"; return x # more\ndef h(x, # the x\n      y=1): return x # the y\n')['a']
    assert said(a['f']) == dict(text='what it is', params={}, fields={}, more=[])
    assert said(a['g'])['text'] == 'Said' and said(a['h'])['params'] == {'x': 'the x', 'y': 'the y'}

def test_a_dataclass_has_an_init_without_source(visit):
    "And its fields are described"
    A = visit(a='''
from dataclasses import dataclass
@dataclass(frozen=True)
class A:
    "A"
    x: int
    y: str=None # the y
    _z: int=0 # private
''')['a.A']
    assert said(A) == dict(text='A', params={}, fields={'y': 'the y'}, more=[])
    assert [p.name for p in A['__init__'].parameters] == ['self', 'x', 'y', '_z'] and A['__init__'].docstring is None

def test_members_of_a_class(visit):
    A = visit(a='''
class A:
    "A"
    order = 1 # after 0
    def __init__(self, x): # the x
        self.x = x # no docment
    @property
    def p(self) -> int: # (n,)
        "P"
    @cached_property
    def q(self): "Q"
    @classmethod
    def c(cls,
        n: int=1 # how many
    ) -> 'A': # anew
        "C"
    @staticmethod
    def s(x): # the x
        """S
over lines that begin further left"""
    class B:
        b: int # the b
''')['a.A']
    assert said(A)['fields'] == {'order': 'after 0'} and A['x'].docstring is None
    assert said(A['__init__'])['params'] == {'x': 'the x'}
    assert said(A['p']) == dict(text='P', params={}, fields={}, more=['**Returns:** (n,)']) and said(A['q'])['text'] == 'Q'
    assert said(A['c']) == dict(text='C', params={'n': 'how many'}, fields={}, more=['**Returns:** anew'])
    assert said(A['s'])['params'] == {'x': 'the x'} and said(A['B'])['fields'] == {'b': 'the b'}

def test_what_is_assigned(visit):
    a = visit(a='f = lambda x: x # the same\ng = partial(f, 1)\nif g:\n    def h(x): # in a branch\n        "H"\n')['a']
    assert said(a['f'])['text'] == 'the same' and a['g'].docstring is None and said(a['h'])['params'] == {'x': 'in a branch'}

@pytest.mark.parametrize('here', ['a', 'c'])
def test_a_patched_method_is_shown_in_its_class(visit, here):
    "Whichever module comes first"
    patched = 'from .b import B\n@patch\ndef m(self:B,\n    x=1 # the x\n): "M"\n'
    pkg = visit(**{here: patched, 'b': 'class B:\n    "B"\n@patch\ndef n(self:B): # no parameter\n    "N"\n'})
    assert said(pkg['b.B.m'])['params'] == {'x': 'the x'} and 'm' not in pkg[here].members
    assert said(pkg['b.B.n'])['text'] == 'N' and 'n' not in pkg['b'].members

def test_what_a_module_passes_on_is_shown_where_it_is_defined(visit):
    pkg = visit(a='''
"A"
from .b import f, g, N
from math import pi
__all__ = ["f", "N", "pi", "h"]
_all_ = ["f", "N"]
def h(): "H"
''', b='''
N = 3
def f(x): # the x
    "F"
def g(): "G"
''')
    assert [o.name for o in pkg['a'].members.values() if o.is_public] == ['h']
    assert said(pkg['a'])['more'] == ['Also here: [`f`][pkg.b.f], `N`'] # of which nothing is said
    assert pkg['b.f'].is_public and said(pkg['b.f'])['params'] == {'x': 'the x'}

# What .github/CONTRIBUTING.md says

def rows(heading):
    "The rows of the first table below `heading`: its cells"
    table = re.search(r'^\|.*\n\|[-| ]+\n((?:\|.*\n)+)', CONTRIBUTING[CONTRIBUTING.index(f'\n## {heading}\n'):], re.M)[1]
    return [[o.strip() for o in line.strip('|').split('|')] for line in table.splitlines()]

def quoted(text): return re.findall('`([^`]+)`', text)

def test_the_table_of_orders():
    "Every callback with its order; where two have one name, with their modules"
    for m in pkgutil.iter_modules(miniai.__path__): importlib.import_module(f'miniai.{m.name}')
    def below(cls): return {c for sub in cls.__subclasses__() for c in {sub} | below(sub)}
    cbs = [c for c in below(Callback) if c.__module__.startswith('miniai.') and c.__name__[0] != '_']
    names = [c.__name__ for c in cbs]
    def name(c): return c.__name__ if names.count(c.__name__) == 1 else f'{c.__module__.removeprefix("miniai.")}.{c.__name__}'
    said = {nm: float(order) for order,cells,_ in rows('Callbacks and their order') for nm in quoted(cells)}
    assert said == {name(c): c.order for c in cbs}

def test_the_table_of_rooms():
    "Every notebook with the modules that it fills, and those that fill none"
    filled = {}
    for p in (ROOT/'miniai').glob('[!_]*.py'):
        for nb in re.findall(r'^# %% \.\./nbs/(.+)\.ipynb', p.read_text(encoding='utf-8'), re.M): filled.setdefault(nb, set()).add(p.stem)
    said = {nb: set(quoted(mods)) for nbs,mods,_ in rows('Where things live') for nb in quoted(nbs)}
    assert {nb: mods for nb,mods in said.items() if mods} == filled
    assert all((ROOT/f'nbs/{nb}.ipynb').exists() for nb in said)

def test_it_is_short(): assert len(CONTRIBUTING.splitlines()) < 120
