"""Check the order of the notebooks: exported code builds on lower numbers only, by name.

    python scripts/check_imports.py

It also checks what keeps the notebooks exportable and readable as pages: one number and one module for each notebook,
one title, imports in cells of their own (where a notebook exports, the site runs cells of imports), sources stored as
lines, unique cell ids, the size, and words for every figure.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dilated_attention_nb"
MAX_BYTES = 500_000

RINGS = {"ring", "ring_engine"}
# Exported code may import from every lower number, except where a room is kept narrower than that.
ONLY = {
    "config": set(),
    "files": {"config"},
    "testing": {"config"},
    "memory_pool": {"config"},
    "plotting": {"config", "files", "testing"},  # testing: who attends to whom
    "masking": {"config"},
    "partial": {"masking"},
    "backends": {"config", "partial"},
    "triton_forward": {"config", "masking"},
    "triton_backward": {"config", "triton_forward"},
    "block_patterns": {"config", "plotting", "masking"},  # plotting: for BlockPattern.plot alone
    "block_sparse": {"config", "backends", "partial", "block_patterns"},
    "adaptive": {"config", "backends", "block_patterns", "block_sparse"},
    "ring": {"config", "backends", "partial"},
    "ring_engine": {"config", "backends", "memory_pool", "ring"},
    "ring_dilated": {"config", "masking", "backends", "partial", "memory_pool", *RINGS},
    "ring_block_sparse": {"config", "partial", "memory_pool", *RINGS, "block_patterns", "block_sparse"},
}
NOT = {"improved": {"dilated"}}
# Every lesson may use these; exported code only where it is named here.
LESSONS = {
    "testing": {"multihead", "benchmarks", "__main__"},  # need_weights at short lengths is the oracle's job
    "plotting": {"runs", "benchmarks"},
}
LEAVES = {"benchmarks"}  # nothing imports these
TOOLS = 30  # from this number on: exported code of others imports them in a function, or for a type under TYPE_CHECKING
EVERYWHERE = {"files"}  # a tool that stands last because it is no step of the way

NUMBERED = re.compile(r"^(\d+)([a-z]?)_(\w+)\.ipynb$")  # a letter stands between two numbers: 07, 07b, 08
DEFAULT_EXP = re.compile(r"^\s*#\|\s*default_exp\s+(\S+)", re.MULTILINE)
EXPORT = re.compile(r"^\s*#\|\s*exports?i?\b", re.MULTILINE)
FIG_ALT = re.compile(r'^#\| fig-alt: "(.*)"$', re.MULTILINE)
MAGIC = re.compile(r"^\s*[%!].*$", re.MULTILINE)
DEFINES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr)


@dataclass
class Notebook:
    path: Path
    cells: list[dict]
    number: float | None = None
    modules: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    def code(self) -> list[tuple[int, dict, str]]:
        "Number, cell and source of the code cells."
        return [(i, c, source(c)) for i, c in enumerate(self.cells, 1) if c["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def read(path: Path) -> Notebook:
    nb = Notebook(path, json.loads(path.read_text(encoding="utf-8"))["cells"])
    if match := NUMBERED.match(path.name):
        nb.number = int(match[1]) + (ord(match[2]) - 96) / 27 if match[2] else int(match[1])
    nb.modules = [m for _, _, text in nb.code() for m in DEFAULT_EXP.findall(text)]
    return nb


def parse(text: str) -> ast.Module | None:
    "The syntax tree of a cell, without its magics; None if it is no Python."
    try:
        return ast.parse(MAGIC.sub("", text))
    except SyntaxError:
        return None


def imports(tree: ast.Module) -> list[tuple[str, list[str], bool]]:
    """Everything that a cell imports from this package: module, names, and whether a function or a type does it.

    Not what methods import: what a class of models can do, as to write, may be built on it by a later notebook.
    """
    inner = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.If))]  # if TYPE_CHECKING
    local = {id(node) for outer in inner for node in ast.walk(outer)}
    methods = [f for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body]
    inside = {id(node) for f in methods if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    imported = []
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            modules = [a.name for a in node.names if a.name.split(".")[0] == PACKAGE]
            imported += [(name, [], id(node) in local) for name in modules]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == PACKAGE):
            module = "." * node.level + (node.module or "")
            imported.append((module, [a.name for a in node.names], id(node) in local))
    return imported


def refusal(me: str, target: str) -> str:
    "Why exported code of module `me` may not import the lower module `target`; empty if it may."
    if target in LEAVES:
        return f"nothing imports {target}"
    if target in LESSONS and me not in LESSONS[target] and target not in ONLY.get(me, ()):
        return f"{target} is for lessons and tests; exported code of {me} must not need it"
    if target in NOT.get(me, ()) or target not in ONLY.get(me, {target}):
        return f"{me} may not import {target} (see the tables in scripts/check_imports.py)"
    return ""


def check_order(notebooks: list[Notebook]) -> list[str]:
    "Exported code imports by name, from lower numbers, and from the rooms that are open to it."
    numbers = {nb.modules[0]: nb.number for nb in notebooks if nb.modules and nb.number is not None}
    wrong = []
    for nb in notebooks:
        for i, _, text in nb.code():
            tree = parse(text) if EXPORT.search(text) else None
            for module, names, local in imports(tree) if tree else []:
                where = f"{nb.name}, cell {i}: "
                target = module.removeprefix(PACKAGE).removeprefix(".")
                me = nb.modules[0] if nb.modules else nb.name
                if module.startswith("."):
                    wrong.append(where + f"relative import of {module}; write `from {PACKAGE}.x import name`")
                elif not names:
                    wrong.append(where + f"`import {module}`; import the names: `from {module} import name`")
                elif "*" in names:
                    wrong.append(where + f"`from {module} import *`; import the names")
                elif not target and names == ["__version__"]:
                    continue
                elif not target:
                    wrong.append(
                        where + f"imports from the package root; name the module that holds {', '.join(names)}"
                    )
                elif target not in numbers:
                    wrong.append(where + f"imports from {target}, which no numbered notebook exports")
                elif nb.number is not None and numbers[target] >= TOOLS > nb.number and (local or target in EVERYWHERE):
                    wrong += [where + reason] if (reason := refusal(me, target)) else []
                elif nb.number is None or (numbers[target] >= nb.number and target not in EVERYWHERE):
                    wrong.append(
                        where + f"imports from {target} (number {numbers[target]}), which is not lower than its own"
                    )
                elif reason := refusal(me, target):
                    wrong.append(where + reason)
    return wrong


def check_numbers(notebooks: list[Notebook]) -> list[str]:
    "One number, one module, one name for each; an export without a module would be lost."
    wrong = []
    seen: dict[object, str] = {}
    for nb in notebooks:
        for key, what in [(nb.number, f"number {nb.number}"), *((m, f"module {m}") for m in nb.modules)]:
            if key is not None and key in seen:
                wrong.append(f"{nb.name}: {what} is taken by {seen[key]}")
            seen.setdefault(key, nb.name)
        match = NUMBERED.match(nb.name)
        if len(nb.modules) > 1:
            wrong.append(f"{nb.name}: {len(nb.modules)} `default_exp` cells; one notebook makes one module")
        elif nb.modules and not (match and match[3] == nb.modules[0].strip("_")):  # __main__ comes from NN_main
            wrong.append(f"{nb.name}: exports {nb.modules[0]}; call it NN_{nb.modules[0]}.ipynb")
        elif not nb.modules and any(EXPORT.search(text) for _, _, text in nb.code()):
            wrong.append(f"{nb.name}: exports cells but has no `#| default_exp`")
    return wrong


def check_cells(nb: Notebook) -> list[str]:
    "What would be lost, run or reformatted on the way to the site."
    wrong = []
    size = nb.path.stat().st_size
    if size > MAX_BYTES:
        wrong.append(
            f"{nb.name}: {size / 1000:.0f} KB stored, at most {MAX_BYTES / 1000:.0f}; smaller figures, fewer outputs"
        )
    titles = [source(c) for c in nb.cells if c["cell_type"] == "markdown" and source(c).startswith("# ")]
    if len(titles) != 1:
        wrong.append(f"{nb.name}: {len(titles)} markdown cells begin with `# Title`; one is the page's title")
    ids = [c.get("id") for c in nb.cells]
    if None in ids or len(set(ids)) < len(ids):
        wrong.append(f"{nb.name}: cells without an id, or two with the same")
    for i, cell in enumerate(nb.cells, 1):
        if isinstance(cell["source"], str) or any("\n" in line[:-1] for line in cell["source"]):
            wrong.append(f"{nb.name}, cell {i}: the source is not a list of lines")
    for i, cell, text in nb.code():
        shown = any(kind.startswith("image/") for out in cell.get("outputs", []) for kind in out.get("data", {}))
        alt = FIG_ALT.search(text)
        if alt and not shown:
            wrong.append(f"{nb.name}, cell {i} ({cell.get('id')}): words for a figure that isn't stored; execute it")
        if shown and (alt is None or len(alt[1].split()) < 5):
            wrong.append(
                f"{nb.name}, cell {i} ({cell.get('id')}): a figure without words; "
                'begin the cell with `#| fig-alt: "..."` and say what is to be seen in it'
            )
        tree = parse(text)
        if tree is None:
            if EXPORT.search(text):
                wrong.append(f"{nb.name}, cell {i}: exported, but no Python")
            continue
        kinds = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body]
        if nb.modules and any(kinds) and any(isinstance(node, DEFINES) for node in tree.body):
            wrong.append(
                f"{nb.name}, cell {i}: imports and other code in one cell; give the imports a cell of their own"
            )
    return wrong


def find(root: Path) -> list[Notebook]:
    found = [p for p in root.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(root).parts)]
    return [read(p) for p in sorted(found)]


def check(root: Path = ROOT) -> list[str]:
    notebooks = find(root)
    wrong = check_numbers(notebooks) + check_order(notebooks)
    for nb in notebooks:
        wrong += check_cells(nb)
    return wrong


def main() -> int:
    wrong = check()
    for line in wrong:
        print(line, file=sys.stderr)
    count = len(find(ROOT))
    print(f"import order and cells: {count} notebooks, {len(wrong)} complaints")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
