"""What lets one notebook fill two modules: nbdev-export begins a module only where a notebook has it as its `default_exp`, and
appends to it everywhere else. pyproject.toml names this class as a processor of the export, in `export_procs`."""
import ast

class Room:
    "A cell `#| export room` that opens with a docstring begins the module `room` anew, with that docstring"
    def __init__(self, nb): self.nb = nb

    def _export_(self, cell, room=None):
        tree = ast.parse(cell.source if room else '')
        doc = ast.get_docstring(tree)
        if doc is None: return
        self._begin(room, doc)
        cell.set_source(''.join(cell.source.splitlines(keepends=True)[tree.body[0].end_lineno:]).lstrip('\n'))

    def _begin(self, room, doc):
        from fastcore.nbio import mk_cell
        from nbdev.config import get_config
        from nbdev.maker import ModuleMaker
        title = mk_cell(f'# {room}\n\n' + '\n'.join(f'> {line}' for line in doc.splitlines()), cell_type='markdown')
        ModuleMaker(get_config().lib_path, room, self.nb.path_).make([title])
