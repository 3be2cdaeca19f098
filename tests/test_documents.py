"""What the documents say is so: code runs, links lead somewhere, names exist, every defect has its guard."""

import ast
import builtins
import contextlib
import functools
import importlib
import inspect
import io
import json
import keyword
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dilated_attention_nb"
sys.path.insert(0, str(ROOT / "scripts"))
import defects  # noqa: E402

sys.path.pop(0)

# Written by programs, or by a run: named in documents, absent from a fresh clone.
GENERATED = (
    "_docs/",
    "_proc/",
    "runs/",
    "config.json",
    "model.safetensors",
    "losses.jsonl",
    "metrics.jsonl",
    "results.json",
    "sample.txt",
)
# Names of other systems, which the documents compare with or explain: (name, whose).
FOREIGN = {
    "FlopCounterMode": "torch.utils.flop_counter",
    "TorchFunctionMode": "torch.overrides",
    "fullgraph": "torch.compile",
    "dynamic": "torch.compile",
    "assume_constant_result": "torch.compiler",
    "to_empty": "a method of modules",
    "NCCL_SOCKET_IFNAME": "NCCL",
    "NCCL_DEBUG": "NCCL",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "torch.distributed",
    "all_gather": "torch.distributed",
    "batch_isend_irecv": "torch.distributed",
    "sendrecv": "a call that does not exist",
    "set_": "a method of tensors",
    "save_for_backward": "autograd",
    "deepcopy": "copy",
    "_dynamo": "torch",
    "malloc": "C",
    "M_MMAP_THRESHOLD": "C",
    "DilatedTransformerEncoderLayer": "fkodom",
    "DilatedTransformerDecoderLayer": "fkodom",
    "LongNetLM": "fkodom",
    "num_tokens": "fkodom",
    "softmax_scale": "fkodom and DarcStar",
    "attention_mask": "DarcStar and transformers",
    "attention_dropout": "fkodom",
    "op": "fkodom",
    "blockSize": "DarcStar",
    "flash_attn_func": "flash-attn",
    "ImprovedMultiheadDilatedAttention": "DarcStar",
    "LongNet(d_model": "DarcStar",
    "RingDilatedAttentionV2": "DarcStar",
    "RingDilatedAttentionProduction": "DarcStar",
    "create_block_sparse_attention": "DarcStar",
    "create_adaptive_sparse_attention": "DarcStar",
    "BlockSparseOptimized": "DarcStar",
    "BlockSparseTorchSparse": "DarcStar",
    "BlockSparseRingDistributedDilatedAttention": "DarcStar",
    "DistributedImprovedDilatedAttention": "DarcStar",
    "clear_unused_buffers": "DarcStar",
    "_cached_indices": "DarcStar",
    "_factory_kwargs": "DarcStar",
    "_init_qkv_projections": "DarcStar",
    "get_memory_info": "DarcStar",
    "EncoderConfig": "torchscale",
    "slide_encoder": "GigaPath",
    "incremental_state": "torchscale",
    "xpos_scale_base": "torchscale",
    "zeros_like": "torch",
    "move_to_end": "OrderedDict",
    "no_grad": "torch",
    "scaled_dot_product_attention": "torch",
    "CheckpointException": "torch.distributed.checkpoint",
    "KINETO_LOG_LEVEL": "PyTorch's profiler",
    "attn_implementation": "transformers",
    "finalize": "weakref",
    "mock": "unittest",
    "nbdev_test": "nbdev",
}
NOTATION = {"kv_h", "eps_sum", "NUMBER", "PARAMETER"}  # sizes and formulas in docstrings
PATH = re.compile(r"[\w.*/-]+\.(?:py|ipynb|qmd|md|jsonl|json|ini|toml|txt|yml|css|png|npz|safetensors)(?!\w)")


def documents() -> dict[str, Path]:
    paths = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "index.ipynb")]
    paths += sorted((ROOT / "nbs").rglob("*.ipynb")) + sorted((ROOT / "nbs").rglob("*.qmd"))
    return {
        p.relative_to(ROOT).as_posix(): p for p in paths if not any(x[0] in "._" for x in p.relative_to(ROOT).parts)
    }


DOCUMENTS = documents()
MODULES = sorted(p.stem for p in PACKAGE.glob("[!_]*.py"))
each_document = pytest.mark.parametrize("name", DOCUMENTS)


@functools.cache
def notebook(path: Path) -> tuple[list[str], list[str]]:
    "Markdown and code cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    of = {kind: ["".join(c["source"]) for c in cells if c["cell_type"] == kind] for kind in ("markdown", "code")}
    return of["markdown"], of["code"]


@functools.cache
def prose(path: Path) -> str:
    return "\n\n".join(notebook(path)[0]) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")


def unfenced(text: str) -> str:
    return re.sub(r"^(`{3,}).*?^\1\s*?$", "", text, flags=re.DOTALL | re.MULTILINE)


def fences(text: str, *languages: str) -> list[str]:
    pattern = re.compile(
        r"^`{3,}\{?(" + "|".join(languages) + r")\}?[^\n]*\n(.*?)^`{3,}\s*?$", re.DOTALL | re.MULTILINE
    )
    return [m[2] for m in pattern.finditer(text)]


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {module: ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")) for module in MODULES}


@functools.cache
def programs() -> dict[str, ast.Module]:
    "What has docstrings and is no numbered module: the root, `python -m`, scripts and benchmarks."
    paths = [PACKAGE / "__init__.py", PACKAGE / "__main__.py", ROOT / "setup.py"]
    paths += sorted((ROOT / "scripts").glob("*.py")) + sorted((ROOT / "benchmarks").glob("*.py"))
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text(encoding="utf-8")) for p in paths if p.exists()}


def docstrings() -> list[tuple[str, str]]:
    "Where it stands, and the text."
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = []
    for module, tree in (trees() | programs()).items():
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                found.append((f"{module}.{getattr(node, 'name', '')}", text))
    return found


# ---------------------------------------------------------------- code


PYTHON = [(name, i, code) for name, p in DOCUMENTS.items() for i, code in enumerate(fences(prose(p), "python", "py"))]
PYTHON += [(name, 0, code) for name, text in docstrings() for code in fences(text, "python", "py")]


@pytest.mark.parametrize("name,number,code", PYTHON, ids=[f"{name}-{i}" for name, i, _ in PYTHON])
def test_code_in_documents_runs(name, number, code, monkeypatch, tmp_path):
    "As it stands there; where the text shows what it prints, it prints that."
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
    shown = re.search(re.escape(code) + r"`{3,}\n\n`{3,}\n(.*?)`{3,}", prose(DOCUMENTS[name]), re.DOTALL)
    assert shown is None or said.getvalue() == shown[1]


def page_imports(path: Path) -> list[ast.ImportFrom]:
    "What a notebook's cells import from the package."
    cells = notebook(path)[1] if path.suffix == ".ipynb" else []
    nodes = [n for code in cells for n in ast.parse(re.sub(r"^\s*[%!].*$", "", code, flags=re.MULTILINE)).body]
    return [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(PACKAGE.name)]


def in_a_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_the_recipe_for_gigapaths_file_asks_for_that_file():
    "It is shown and not run, as the file can't be had here."
    path = DOCUMENTS["nbs/examples/gigapath.ipynb"]
    (recipe,) = re.findall(r"^```\n(.*?from_pretrained.*?)^```$", prose(path), re.MULTILINE | re.DOTALL)
    done = in_a_new_process("\n".join(map(ast.unparse, page_imports(path))) + "\n" + recipe)
    assert "FileNotFoundError: slide_encoder.pth isn't there" in done.stderr


def test_messages_that_a_page_quotes_are_those_of_the_code():
    "Of cluster.qmd's table: what stands between names and numbers is somewhere in the package."
    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "dilated_attention_nb").glob("*.py"))]
    constants = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    words = [value for value in constants if isinstance(value, str)]
    rows = re.findall(r"^\| (`.*?`) \|", DOCUMENTS["nbs/explanations/cluster.qmd"].read_text(), re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall("`([^`]+)`", row)]
    ours = [quote for quote in quoted if " must " in quote]
    assert ours
    for quote in ours:
        rules = re.split(r"-?\d[\d.]*|'\w+'|\.\.\.|; ", quote.split(" must ")[1].split(", got ")[0])
        for rule in (part.strip(" ,") for part in rules):
            assert any(rule in text for text in words), f"{quote!r}: no message says {rule!r}"


def test_no_interactive_examples_go_unchecked():
    "Docstrings have no `>>>` examples, which nothing would run: examples are cells below the function."
    assert [where for where, text in docstrings() if ">>>" in text] == []


def test_every_import_in_documents_exists():
    "In fenced code of any language, in backticks, in docstrings."
    texts = [(name, prose(path)) for name, path in DOCUMENTS.items()] + docstrings()
    found = [(name, *one) for name, text in texts for one in imported(text)]
    assert found
    for name, module, wanted in found:
        assert hasattr(importlib.import_module(module), wanted), f"{name}: {module} has no {wanted}"


def imported(text: str) -> list[tuple[str, str]]:
    "Module and name of every import from the package, on one line or in parentheses over several."
    pattern = re.compile(r"from (dilated_attention_nb[\w.]*) import (?:\(([^)]+)\)|([\w, ]+))")
    found = []
    for module, several, line in pattern.findall(text):
        names = re.sub(r"#[^\n]*", "", several or line)
        found += [(module, part.split()[0]) for part in re.split(r",\s*", names) if part.strip()]
    return found


def test_commands_in_documents_exist():
    "make's targets, scripts, and modules that are run."
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for name, path in DOCUMENTS.items():
        text = prose(path)
        commands = fences(text, "bash", "sh", "console") + re.findall(r"`([^`\n]+)`", unfenced(text))
        for command in commands:
            for target in re.findall(r"(?:^|\n|\s)make ([a-z][\w-]*)", command):
                assert target in targets, f"{name}: `make {target}` is no target of the Makefile"
            for script in re.findall(r"python ((?:scripts|benchmarks)/[\w/]+\.py)", command):
                assert (ROOT / script).exists(), f"{name}: there is no {script}"
            for module in re.findall(r"python -m (dilated_attention_nb[\w.]*)", command):
                assert importlib.util.find_spec(module), f"{name}: there is no module {module}"


# ---------------------------------------------------------------- Markdown


def misread(text: str) -> list[str]:
    "Lines that pandoc, and so Quarto, reads as part of what stands before them, or as a list that is none."
    kinds = {"heading": r"#{1,6} ", "bullet": r"\s*[-*+] ", "number": r"\s*\d+[.)] ", "table": r"\|", "quote": r"> "}
    found, fence, before, inside = [], "", "", set()  # inside: what has begun since the last empty line
    for number, line in enumerate(text.splitlines(), 1):
        ticks = re.match(r"\s*(`{3,}|~{3,})", line)
        if fence:
            fence = "" if line.strip().startswith(fence) else fence
            continue
        if ticks or not line.strip():
            fence, before, inside = ticks[1] if ticks else "", "", set()
            continue
        kind = next((name for name, pattern in kinds.items() if re.match(pattern, line)), "")
        if kind and before and (kind == "heading" or kind not in inside) and not (kind == "bullet" and line[0] == " "):
            found.append(f"line {number}: {kind} without an empty line before it: {line[:60]}")
        inside |= {kind}
        before = line
    return found


@each_document
def test_markdown_means_the_same_everywhere(name):
    "The preview's Markdown needs no empty lines before headings and lists, pandoc does."
    path = DOCUMENTS[name]
    texts = notebook(path)[0] if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    wrong = [what for text in texts for what in misread(text)]
    assert not wrong, f"{name}:\n" + "\n".join(wrong)


# ---------------------------------------------------------------- links


@each_document
def test_every_link_leads_somewhere(name):
    "Files exist; of notebooks of this project, anchors too."
    path, wrong = DOCUMENTS[name], []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", unfenced(prose(path)))):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and there.suffix == ".ipynb" and anchor not in defects.anchors(there):
            wrong.append(f"{target}: no such heading; there are {', '.join(sorted(defects.anchors(there)))}")
    assert not wrong, f"{name}:\n" + "\n".join(wrong)


# ---------------------------------------------------------------- names


def identifiers(tree: ast.AST) -> set[str]:
    found = set()
    for n in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(value := getattr(n, field, None), str):
                found.update(value.split("."))
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", n.value):
            found.update(n.value.split("."))  # a key, a value of an option; not a word of a sentence
        if isinstance(n, ast.ImportFrom) and n.module:
            found.update(n.module.split("."))
    return found


@functools.cache
def vocabulary() -> frozenset[str]:
    "Names that occur in the package's code (not its docstrings), Python, PyTorch, and the settings."
    known = set(dir(builtins)) | set(keyword.kwlist) | set(sys.stdlib_module_names) | set(MODULES)
    for tree in trees().values():
        known |= identifiers(without_docstrings(tree))
    for module in (torch, torch.nn, torch.nn.functional, torch.distributed, torch.Tensor, matplotlib.pyplot):
        known |= set(dir(module))
    known |= set.union(*defects.tests(ROOT).values())  # also those of this file, whose other words prove nothing
    for path in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "setup.py"]:
        known |= identifiers(ast.parse(path.read_text(encoding="utf-8")))
    for path in (ROOT / "tests").glob("*.py"):  # what a test calls something proves nothing: only what is defined there
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known |= {path.stem, *(n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef)))}
    return frozenset(
        known | set(re.findall(r"\w+", (ROOT / "settings.ini").read_text() + (ROOT / "Makefile").read_text()))
    )


def without_docstrings(tree: ast.Module) -> ast.Module:
    copy = ast.parse(ast.unparse(tree))
    for node in ast.walk(copy):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return copy


@functools.cache
def own(path: Path) -> frozenset[str]:
    "Names in the code of a notebook."
    found = set()
    for code in notebook(path)[1] if path.suffix == ".ipynb" else ():
        with contextlib.suppress(SyntaxError):
            found |= identifiers(ast.parse(re.sub(r"^\s*[%!].*$", "", code, flags=re.MULTILINE)))
    return frozenset(found)


def resolves(chain: list[str]) -> bool:
    "Whether a dotted name that begins at the package or PyTorch exists."
    roots = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "dist": torch.distributed}
    first, *rest = chain
    if first == "config":  # the module, or any config
        classes = [
            c for c in vars(importlib.import_module("dilated_attention_nb.config")).values() if isinstance(c, type)
        ]
        if any(rest[0] in getattr(c, "__annotations__", {}) or hasattr(c, rest[0]) for c in classes if rest):
            return True
    if first in roots:
        home = roots[first]
    elif first in MODULES:
        home = importlib.import_module(f"dilated_attention_nb.{first}")
    else:
        homes = [importlib.import_module(f"dilated_attention_nb.{module}") for module in MODULES]
        homes = [home for home in homes if first in home.__all__]
        if not homes:
            return True  # of something else: its parts are looked up one by one
        home = getattr(homes[0], first)
    for part in rest:
        if inspect.ismodule(home) and not hasattr(home, part):
            with contextlib.suppress(ImportError):  # a submodule that nobody has imported yet
                importlib.import_module(f"{home.__name__}.{part}")
        if not hasattr(home, part) and part not in getattr(home, "__annotations__", {}):
            return False
        home = getattr(home, part, object)
    return True


def mentioned(text: str) -> list[tuple[str, list[str]]]:
    "What stands in backticks and is Python: the text, and its dotted names."
    found = []
    for snippet in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if PATH.search(snippet):
            continue  # a file, see `missing_files`
        code = snippet.replace("…", "...")
        try:
            tree = ast.parse(code.strip())
        except SyntaxError:
            continue
        chains, inner = [], set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                parts, at = [node.attr], node.value
                inner.add(id(at))
                while isinstance(at, ast.Attribute):
                    parts, at = [at.attr, *parts], at.value
                    inner.add(id(at))
                chains.append([at.id, *parts] if isinstance(at, ast.Name) else parts)
            elif isinstance(node, ast.Name) and id(node) not in inner:
                chains.append([node.id])
            elif isinstance(node, ast.keyword) and node.arg:
                chains.append([node.arg])
        called = isinstance(getattr(tree.body[0], "value", None), ast.Call) if tree.body else False
        found.append((snippet, [c for c in chains if called or len(c) > 1 or looks_like_a_name(c[0])]))
    return found


def looks_like_a_name(word: str) -> bool:
    "snake_case or CamelCase, not a word or a letter of a formula."
    return "_" in word.strip("_") or re.search(r"[a-z][A-Z]|[A-Z][a-z]+[A-Z]", word) is not None


def unknown(text: str, known: frozenset[str]) -> list[str]:
    wrong = []
    for snippet, chains in mentioned(text):
        for chain in chains:
            if any(part in FOREIGN or part in NOTATION for part in chain):
                continue
            missing = [part for part in chain if part not in known and part not in vocabulary()]
            if missing or not resolves(chain):
                wrong.append(f"`{snippet}`: {'.'.join(missing or chain)} is no name of this project")
    return wrong


def missing_files(text: str) -> list[str]:
    wrong = []
    for snippet in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        for file in PATH.findall(snippet) + re.findall(r"^([\w.]+/)$", snippet):
            folders = (ROOT, ROOT / "nbs", ROOT / "tests", ROOT / "scripts", ROOT / "benchmarks", PACKAGE)
            if file in GENERATED or Path(file).stem in FOREIGN or file.startswith(("NN_", "/")):
                continue
            if not any(True for folder in folders for _ in folder.glob(file)):
                wrong.append(f"`{snippet}`: there is no {file}")
    return wrong


@each_document
def test_every_file_and_symbol_named_exists(name):
    "In backticks, outside of code: paths, and names that look like names of code."
    path = DOCUMENTS[name]
    text = unfenced(prose(path))
    ours = re.sub(r"^\|[^|\n]*\|", "|", text, flags=re.MULTILINE) if "| there | here |" in text else text  # not theirs
    wrong = missing_files(text) + unknown(ours, own(path))
    assert not wrong, f"{name}:\n" + "\n".join(wrong)


def test_every_file_and_symbol_named_in_docstrings_exists():
    wrong = [
        f"{where}: {what}" for where, text in docstrings() for what in missing_files(text) + unknown(text, frozenset())
    ]
    assert not wrong, "\n".join(wrong)


def test_the_checks_of_names_find_what_is_wrong():
    "A check that nothing fails is none."
    assert missing_files("see `ring_that_is_not_there.py` and `scripts/readme.py`") == [
        "`ring_that_is_not_there.py`: there is no ring_that_is_not_there.py"
    ]
    for text in (
        "`AdvancedDilatedAttention`",
        "`config.check_nothing`",
        "`dilated_attention(q, k, v, no_such_option=1)`",
    ):
        assert unknown(text, frozenset()), text
    assert not unknown("`dilated_attention(q, k, v, mixing='softmax')`, `torch.nn.Linear`, `b n h d`", frozenset())


# ---------------------------------------------------------------- defects


def test_every_guard_exists():
    "Each section and each row of nbs/[0-9]*_defects names tests that exist; sections also their origin and a layer."
    texts, wrong = defects.wanted(ROOT)
    stale = [p.name for p, text in texts.items() if p.read_text(encoding="utf-8") != text]
    wrong += [f"{name}: links are stale; run `python scripts/defects.py`" for name in stale]
    assert texts and not wrong, "\n".join(wrong)


def test_the_check_of_guards_finds_what_is_wrong(tmp_path):
    "A section or a row with a test, a notebook or an anchor that is not there; one that moved is mended."
    cells = [
        "# Layer\n\n## A heading",
        "### One\n\n- **From:** a report\n- **It did:** harm\n- **Layer:** [ring](13_ring.ipynb#a-heading)\n"
        "- **Guard:** `tests/test_old.py::test_here`",
        "### Two\n\n- **From:** a report\n- **Layer:** [ring](13_ring.ipynb#nowhere)\n"
        "- **Guard:** `tests/test_a.py::test_not`",
        "| defect | it did | guard |\n|---|---|---|\n| Three | harm | `tests/test_old.py::test_here` |\n"
        "| Four | harm | nobody |",
    ]
    (tmp_path / "nbs").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("def test_here():\n    pass\n")
    for name, some in {"09b_ring_plans": cells[:1], "27_defects": cells[1:]}.items():
        made = [dict(cell_type="markdown", id=f"c{i}", metadata={}, source=text) for i, text in enumerate(some)]
        (tmp_path / f"nbs/{name}.ipynb").write_text(json.dumps({"cells": made}))
    texts, wrong = defects.wanted(tmp_path)
    (text,) = texts.values()
    assert "(09b_ring_plans.ipynb#a-heading)" in text and text.count("`tests/test_a.py::test_here`") == 2
    nowhere, missing, line, guard = wrong
    assert "#nowhere leads nowhere" in nowhere and "test_not does not exist" in missing
    assert "It did" in line and "'Four'" in guard


@pytest.mark.parametrize("path", defects.catalogue(ROOT), ids=lambda p: p.stem)
def test_every_defect_is_shown_and_asserted(path):
    "Below each section stands a cell that runs and asserts."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for here, after in zip(cells, cells[1:]):
        title = re.search(r"^### (.+)$", "".join(here["source"]), re.MULTILINE)
        if here["cell_type"] == "markdown" and title:
            code = "".join(after["source"])
            assert after["cell_type"] == "code" and "assert" in code and "eval: false" not in code, title[1]
