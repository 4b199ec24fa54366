"Docments for the reference: a comment behind code describes the parameters on its line, what is returned, or what is assigned"
import ast, io, tokenize
from griffe import Docstring, DocstringAttribute, DocstringParameter, Extension
from griffe import DocstringSectionAttributes, DocstringSectionParameters, DocstringSectionText

FUNCTIONS = ast.FunctionDef,ast.AsyncFunctionDef

def statements(node):
    "What stands in a module and in its classes, but not in functions"
    for n in ast.iter_child_nodes(node):
        if not isinstance(n, ast.stmt): continue
        yield n
        if not isinstance(n, FUNCTIONS): yield from statements(n)

def read(path):
    "Of a file: statements by the line on which they or a decorator of theirs begin, and comments behind code by their line"
    src = path.read_text(encoding='utf-8')
    nodes = {o.lineno: n for n in statements(ast.parse(src)) for o in (n, *getattr(n, 'decorator_list', ()))}
    tokens = tokenize.generate_tokens(io.StringIO(src).readline)
    return nodes,{t.start[0]: t.string.lstrip('# ') for t in tokens if t.type==tokenize.COMMENT and t.line[:t.start[1]].strip()}

def in_signature(fn, comments):
    "Comments in the signature of `fn`: (names of parameters, text), and texts on what is returned"
    names,params,returns = {},[],[]
    for p in (*fn.args.posonlyargs, *fn.args.args, fn.args.vararg, *fn.args.kwonlyargs, fn.args.kwarg):
        if p and p.arg not in ('self', 'cls'): names.setdefault(p.lineno, []).append(p.arg)
    start,body,end = fn.lineno,fn.body[0].lineno,fn.returns and fn.returns.end_lineno
    for n in range(start, body + (body in names and body > start)): # the body may begin on the last parameter's line
        if n not in comments: continue
        if n in names and n != end: params.append((', '.join(names[n]), comments[n]))
        elif n >= max(names, default=0): returns.append(comments[n])
    return params,returns

def add(obj, *sections):
    "Put `sections` behind what the docstring says, if there is one"
    if sections and not obj.docstring: obj.docstring = Docstring('', parent=obj)
    if sections: obj.docstring.parsed.extend(sections)

def describe(obj, nodes, comments):
    "Add the docments of what `obj`, a module or class, holds; what has no source, as the `__init__` of a dataclass, stays as it is"
    fields = []
    for o in obj.members.values():
        node = None if o.is_alias else nodes.get(o.lineno)
        if isinstance(node, ast.ClassDef): describe(o, nodes, comments)
        elif isinstance(node, FUNCTIONS):
            if not o.docstring and node.lineno==node.end_lineno and node.lineno in comments: # all on one line
                o.docstring = Docstring(comments[node.lineno], parent=o)
            params,returns = in_signature(node, comments)
            if params: add(o, DocstringSectionParameters([DocstringParameter(nm, description=text) for nm,text in params]))
            add(o, *(DocstringSectionText(f'**Returns:** {text}') for text in returns))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and not o.docstring and (text := comments.get(node.end_lineno)):
            if obj.is_module: o.docstring = Docstring(text, parent=o)
            elif not o.name.startswith('_'): fields.append(DocstringAttribute(o.name, description=text, annotation=o.annotation))
    if fields: add(obj, DocstringSectionAttributes(fields))

def linked(alias):
    "The name, and where there is one, a link to its description"
    o = alias.final_target
    return f'[`{alias.name}`][{o.path}]' if o.is_public and o.has_docstrings else f'`{alias.name}`'

class Docments(Extension):
    def on_package(self, *, pkg, **kwargs):
        mods = [o for o in (pkg, *pkg.modules.values()) if not o.is_alias]
        for mod in mods: describe(mod, *read(mod.filepath))
        for mod in mods:
            for f in list(mod.functions.values()): # with fastcore's `patch`: shown as the method that it is
                if not f.is_alias and any(str(o.value) == 'patch' for o in f.decorators):
                    cls = mod[str(f.parameters[0].annotation)]
                    mod.del_member(f.name)
                    (cls.final_target if cls.is_alias else cls).set_member(f.name, f)
        for mod in mods:
            elsewhere = [o for o in mod.members.values() if o.is_alias]
            for o in elsewhere: o.public = False # it is shown where it is defined
            own = [o for o in elsewhere if o.name in (mod.exports or ()) and o.target_path.startswith(f'{pkg.name}.')]
            if own: add(mod, DocstringSectionText('Also here: ' + ', '.join(map(linked, own))))
