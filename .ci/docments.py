"Docments for the reference: a comment at a line's end describes the parameters on that line, or what is returned"
import ast, io, tokenize
from textwrap import dedent
from griffe import Docstring, DocstringParameter, DocstringSectionParameters, DocstringSectionText, Extension

class Docments(Extension):
    def on_module(self, *, mod, **kwargs):
        "A function with fastcore's `patch` is shown as the method that it is"
        for f in list(mod.functions.values()):
            if any(str(o.value) == 'patch' for o in f.decorators):
                cls = mod[str(f.parameters[0].annotation)]
                f.extra['miniai']['source'] = f.source # later it is looked for in the class's module
                mod.del_member(f.name)
                (cls.final_target if cls.is_alias else cls).set_member(f.name, f)

    def on_function(self, *, func, **kwargs):
        if func.package.name != 'miniai': return # a library that is imported
        src = dedent(func.extra['miniai'].get('source') or func.source)
        fn,lines,names = ast.parse(src).body[0],src.splitlines(),{}
        for p in (*fn.args.posonlyargs, *fn.args.args, fn.args.vararg, *fn.args.kwonlyargs, fn.args.kwarg):
            if p and p.arg not in ('self', 'cls'): names.setdefault(p.lineno, []).append(p.arg)
        params,returns = [],[]
        for t in tokenize.generate_tokens(io.StringIO(src).readline):
            n = t.start[0]
            if n >= fn.body[0].lineno: break
            if t.type != tokenize.COMMENT or lines[n-1].lstrip().startswith('#'): continue
            text = t.string.lstrip('# ')
            if n in names: params.append(DocstringParameter(', '.join(names[n]), description=text))
            else: returns.append(DocstringSectionText(f'**Returns:** {text}'))
        if not (params or returns): return
        if not func.docstring: func.docstring = Docstring('', parent=func)
        func.docstring.parsed.extend([DocstringSectionParameters(params)]*bool(params) + returns)
