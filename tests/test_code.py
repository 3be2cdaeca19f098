"""The code as trees: one of each, nothing dead, nothing that catches or keeps everything; and its metadata."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dilated_attention_nb"
MODULES = [*sorted(PACKAGE.glob("[!_]*.py")), PACKAGE / "__main__.py"]
TREES = {p.stem: ast.parse(p.read_text(encoding="utf-8")) for p in MODULES}
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
METADATA = SETTINGS["DEFAULT"]
RANGE = r"([<>=!~]+)"


def scopes(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    "Every node with the qualified name of the function or class that it stands in."
    if not hasattr(tree, "scopes"):
        tree.scopes = list(walk(tree, ""))
    return tree.scopes


def walk(tree: ast.AST, inside: str):
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = f"{inside}.{node.name}".lstrip(".")
        yield name, node
        yield from walk(node, name)


def last_name(call: ast.Call) -> str:
    "The name that is called, without what it is an attribute of."
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def calls(pattern: str, trees=None) -> set[str]:
    "`module.function` of every call whose name matches as a whole."
    return {
        f"{module}.{where}"
        for module, tree in (trees or TREES).items()
        for where, node in scopes(tree)
        if isinstance(node, ast.Call) and re.fullmatch(pattern, last_name(node))
    }


def without_modules(found: set[str]) -> set[str]:
    "Functions by their own name: they may move to another room."
    return {name.split(".", 1)[1] for name in found}


def modules_of(found: set[str]) -> set[str]:
    return {name.split(".")[0] for name in found}


# ---------------------------------------------------------------- one of each

# Everything that could be an attention, by what it is made of; functions by their own name: they may move to another
# room. Whatever does the same and stands in none of these tables is a second way.
SOFTMAXES = {  # softmax, logsumexp
    "kept_logits": "probabilities of tokens",
    "draw_tokens": "probabilities of tokens",
    "block_shares": "what a scorer of blocks should learn; computes no output",
    "scorer_loss": "a cross-entropy",
    "losses_op": "the logsumexp of a cross-entropy",
    "_losses_backward": "the gradient of a cross-entropy, differentiable",
}
EXPONENTIALS = {
    "math_forward": "the plain backend",
    "math_backward": "the plain backend",
    "_with_lse_column": "a power of two, to scale by",
    "losses_backward_op": "the gradient of a cross-entropy",
}
PRODUCTS = {  # of matrices
    "_scores": "the plain backend",
    "math_forward": "the plain backend",
    "math_backward": "the plain backend",
    "BlockScorer.choose": "scores of blocks",
    "scorer_loss": "scores of blocks",
    "_chunks": "logits of tokens",
    "losses_backward_op": "the gradient of a cross-entropy",
    "_losses_backward": "the gradient of a cross-entropy, differentiable",
    "token_losses": "logits of tokens, under torch.func",
    "project": "projections",
    "DilatedMHA.forward": "projections",
    "_readable": "contrast of two colours",
}
KERNELS = {f"{name}_{way}" for name in ("flash", "efficient", "cudnn", "flash_attn") for way in ("forward", "backward")}
NAMED = {"_compiled_flex", "_flex"}  # block-sparse attention by FlexAttention, only if it is named
# The one stated exception: a kernel in Triton that takes all branches at once, merges them as it goes, and runs only
# for `backend="triton"`. It is held against the oracle like the others.
FUSED = {"triton_forward", "triton_backward"}
JUDGES = {"testing"}  # the definition that everything is judged by
OTHER_SYSTEMS = {"benchmarks"}  # what is compared with in measurements
DRAWINGS = {"plotting"}

EXP, MERGE = r"exp2?_?|expm1_?", r"logaddexp2?|softplus|logcumsumexp"
SOFTMAX = r"(log_|gumbel_|sparse_)?softmax_?|logsumexp|_softmax"
PRODUCT = r"matmul|bmm|baddbmm|mm|addmm|dot|vdot|tensordot|inner|einsum|linear|multi_dot|chain_matmul"
FUSED_CALL = (
    r"_?scaled_dot_product\w*|_flash_attn_(varlen_)?(forward|backward)|flash_attn_\w*func|flash_attention_\w+"
    r"|\w*memory_efficient_attention\w*|multi_head_attention_forward"
)


def products(trees=None) -> set[str]:
    "`a @ b`, `matmul`, `einsum` and their like."
    written = {
        f"{module}.{where}"
        for module, tree in (trees or TREES).items()
        for where, node in scopes(tree)
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.MatMult)
    }
    return written | calls(PRODUCT, trees)


def kernel_calls(trees=None) -> set[str]:
    "Fused kernels, called or taken to be called later; imports and annotations do not count."
    return {
        f"{module}.{where}"
        for module, tree in (trees or TREES).items()
        for where, node in scopes(tree)
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load)
        and re.fullmatch(FUSED_CALL, node.id if isinstance(node, ast.Name) else node.attr)
    }  # fmt: skip


def names_used(name: str, trees=None) -> set[str]:
    "Where a name is read, except in imports."
    return {
        f"{module}.{where}"
        for module, tree in (trees or TREES).items()
        for where, node in scopes(tree)
        if (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load))
        or (isinstance(node, ast.Attribute) and node.attr == name)
    }


def strange(found: set[str], known, *modules: str) -> set[str]:
    "What is in no table, except in some modules."
    return {n for n in found if n.split(".")[0] not in modules and n.split(".", 1)[1] not in known}


def test_one_place_that_computes_attention():
    "Softmaxes, exponentials, fused kernels, each in a listed function; of kernels one caller for each direction."
    beside = JUDGES | OTHER_SYSTEMS | FUSED
    for found, known in ((calls(SOFTMAX), SOFTMAXES), (calls(EXP), EXPONENTIALS), (kernel_calls(), KERNELS)):
        unexplained = strange(found, known, *beside)
        assert not unexplained, f"a second attention? {unexplained}; use backends, or say in this test what it is"
    assert not strange(names_used("flex_attention"), NAMED, *beside), "FlexAttention outside of what names it"
    for way in ("forward", "backward"):  # which kernel, is asked in one function
        chosen = {
            f"{module}.{where}"
            for module, tree in TREES.items()
            for where, node in scopes(tree)
            if isinstance(node, ast.Attribute) and node.attr == way and ast.unparse(node.value) == "KERNELS[backend]"
        }
        assert chosen == {f"backends.attend_{way}"}
        for kernel in [f"{name}_{way}" for name in ("flash", "efficient", "cudnn", "flash_attn", "math")]:
            assert names_used(kernel) == {"backends."}, f"{kernel} is called past the table of kernels"


def test_the_fused_kernel_is_the_one_exception():
    "What the search sees of it, and that only the operator calls it, if its backend is named."
    assert FUSED <= modules_of(calls(EXP)) and "triton_forward" in modules_of(products())
    for way in ("forward", "backward"):
        users = {n for n in calls(f"fused_{way}") if n.split(".")[0] not in FUSED}
        assert users == {f"improved.{way}_into"}
        body = next(n for n in TREES["improved"].body if getattr(n, "name", "") == f"{way}_into")
        asking = [n for n in ast.walk(body) if isinstance(n, ast.If) and f"fused_{way}(" in ast.unparse(n)]
        assert [ast.unparse(n.test) for n in asking] == ["options.backend == 'triton'"]


def test_one_place_that_scores():
    "Products of matrices, however they are written: each in a function that is listed, with what it multiplies."
    unexplained = strange(products(), PRODUCTS, *JUDGES | OTHER_SYSTEMS | FUSED)
    assert not unexplained, f"who scores queries with keys? {unexplained}"


def test_no_table_lists_what_is_gone():
    "A name that does nothing any more would excuse the next function that takes it."
    for found, known in (
        (calls(SOFTMAX), SOFTMAXES), (calls(EXP), EXPONENTIALS), (products(), PRODUCTS),
        (kernel_calls(), KERNELS), (dilations(), DILATIONS),
    ):  # fmt: skip
        assert set(known) <= without_modules(found), set(known) - without_modules(found)


DILATIONS = {
    "Grid.view": "the tokens of a grid: the one place",
    "branch_mask": "the same as a mask, for pictures and small checks",
    "Grid.count": "how many they are",
    "branch_heads": "which heads have which offset",
    "Series.view": "several views of a grid as one",
    "views": "every second head of a group",
    "Tiles.merge_zeros": "how many tokens a strip has",
    # A cache of one segment keeps the grid in slots: token i in slot (i mod w) // r.
    "_Branch.store": "slots of a cache",
    "read": "blocks at equal distances",
    "_row_groups": "blocks at equal distances",
    # The fused kernel's plan is made of residues; no tensor is cut.
    "row_classes": "rows of the fused kernel that see the same keys",
    "class_table": "the same, numbered",
}
RATE = r"(self\.|\w+\.)*(r|rate|rates|stride|dilation\w*|step_of_grid)(\[\w+\])?"


def dilations(trees=None) -> set[str]:
    "Slices and ranges in steps of a rate, strides set by hand, and `i % w % r`."
    found = set()
    for module, tree in (trees or TREES).items():
        for where, node in scopes(tree):
            variable = isinstance(node, ast.Slice) and node.step is not None
            variable = variable and not isinstance(node.step, (ast.Constant, ast.UnaryOp))
            ranged = isinstance(node, ast.Call) and last_name(node) in ("range", "arange") and len(node.args) == 3
            ranged = ranged and re.fullmatch(RATE, ast.unparse(node.args[2]))
            strided = isinstance(node, ast.Call) and last_name(node) in ("as_strided", "unfold")
            nested = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod)
            left = node.left if nested else None
            nested = isinstance(left, ast.BinOp) and isinstance(left.op, ast.Mod)
            if variable or ranged or strided or nested:
                found.add(f"{module}.{where}")
    return found


def test_one_place_for_grids_and_merges():
    "Partial softmaxes are merged in `merge` and `merge_lse_`; grids are cut in `Grid.view`, made in three places."
    merging = calls(MERGE) | {n for n in calls(r"sigmoid_?") if n.split(".")[0] != "longnet"}
    assert without_modules({n for n in merging if n.split(".")[0] not in OTHER_SYSTEMS}) == {"merge", "merge_lse_"}
    lerps = calls(r"lerp_?")  # out rows, with weights that `partial` made
    weighted = calls(r"merge_lse_")
    for name in lerps:
        module, where = name.split(".", 1)
        asks = any(other.split(".")[0] == module for other in weighted)
        assert module == "partial" or asks, f"{name} merges with weights of its own"
    elsewhere = strange(dilations(), DILATIONS, *JUDGES | OTHER_SYSTEMS | FUSED | DRAWINGS)
    assert not elsewhere, f"a grid cut outside of masking: {elsewhere}"
    made = {n for n in calls("Grid") if n.split(".")[0] not in JUDGES | OTHER_SYSTEMS}
    assert made == {"masking.Grid.within", "masking.grid_pairs", "ring_dilated.Strip.grid"}
    for name in ("branch_heads", "head_groups", "grid_pairs", "tiles", "causal_mask", "Grid"):
        homes = [m for m, tree in TREES.items() for n in tree.body if getattr(n, "name", "") == name]
        assert homes == ["masking"], (name, homes)


SECOND_WAYS = {  # the search that finds it, and the smallest function that is one
    "softmax": (calls, "def f(q, k, v):\n    return (q @ k.mT).softmax(-1) @ v"),
    "product": (products, "def f(q, k):\n    return q @ k.mT"),
    "matmul": (products, "def f(q, k):\n    return torch.matmul(q, k.mT)"),
    "bmm": (products, "def f(q, k):\n    return torch.bmm(q, k)"),
    "einsum": (products, "def f(q, k):\n    return torch.einsum('bihd,bjhd->bhij', q, k)"),
    "kernel in Triton": (products, "@triton.jit\ndef f(q, k):\n    return tl.dot(q, k)"),
    "exp": (calls, "def f(s):\n    p = torch.exp(s - s.amax())\n    return p / p.sum()"),
    "exp_": (calls, "def f(s):\n    return s.exp_()"),
    "exp2": (calls, "@triton.jit\ndef f(s):\n    return tl.exp2(s)"),
    "kernel": (kernel_calls, "def f(q):\n    return F.scaled_dot_product_attention(q, q, q)"),
    "kernel under another name": (
        kernel_calls,
        "def f(q, run=F.scaled_dot_product_attention):\n    return run(q, q, q)",
    ),
    "aten": (kernel_calls, "def f(q):\n    return aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)"),
    "slices": (dilations, "def f(x, s, r):\n    return x[:, s::r]"),
    "ranges": (dilations, "def f(x, s, n, rate):\n    return x.index_select(1, torch.arange(s, n, rate))"),
    "strides": (dilations, "def f(x):\n    return x.as_strided((4, 4), (16, 2))"),
    "residues": (dilations, "def f(i, w, r, s):\n    return i % w % r == s"),
}


@pytest.mark.parametrize("name", SECOND_WAYS)
def test_the_search_finds_a_second_way(name):
    "In a module that is in no table."
    search, source = SECOND_WAYS[name]
    wrong = {"ring": ast.parse(source)}
    pattern = [f"{SOFTMAX}|{EXP}"] if search is calls else []
    found = search(*pattern, wrong)
    assert found == {"ring.f"} and strange(found, [*SOFTMAXES, *EXPONENTIALS, *PRODUCTS, *KERNELS, *DILATIONS], *FUSED)


def test_layers_import_downwards():
    spec = importlib.util.spec_from_file_location("check_imports", ROOT / "scripts/check_imports.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert module.check(ROOT) == []


# ---------------------------------------------------------------- what must not be


HANDS_ON = ("set_exception", "set_exc_info", "format_exc")  # to a future, or as the text that a parent raises


def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether an error can end in this handler and nobody learns of it.

    Never, if it catches by name what it expects. One that catches everything must raise on every way through it, or
    give the error to whoever waits for the result.
    """
    kinds = {ast.unparse(kind).split(".")[-1] for kind in getattr(handler.type, "elts", [handler.type]) if kind}
    if handler.type is not None and not kinds & {"Exception", "BaseException"}:
        return False
    if handler.type is None:
        return True
    given = any(isinstance(n, ast.Call) and last_name(n) in HANDS_ON for node in handler.body for n in ast.walk(node))
    return not (given or isinstance(handler.body[-1], ast.Raise))


def suppressed(node: ast.AST) -> bool:
    "`contextlib.suppress(Exception)` is the same with another name."
    kinds = {ast.unparse(a).split(".")[-1] for a in node.args} if isinstance(node, ast.Call) else set()
    return bool(kinds & {"Exception", "BaseException"}) and last_name(node) == "suppress"


def test_no_except_catches_everything():
    "None is bare; a broad one raises, or hands the error to whoever waits."
    for module, tree in TREES.items():
        for where, node in scopes(tree):
            wrong = isinstance(node, ast.ExceptHandler) and swallows(node)
            assert not wrong and not suppressed(node), f"{module}.{where}, line {node.lineno}: errors are swallowed"


SWALLOWED = [
    "except:\n    raise", "except Exception:\n    pass", "except Exception as e:\n    print(e)",
    "except (ValueError, Exception) as e:\n    x = str(e)", "except BaseException as e:\n    log.warning(e)",
    "except Exception:\n    if strict:\n        raise", "except builtins.Exception:\n    x = other()",
    "except Exception as e:\n    if strict:\n        raise\n    x = other(e)",
]  # fmt: skip
HANDED_ON = [
    "except Exception as e:\n    raise ValueError('no file of tensors') from e",
    "except BaseException:\n    undo()\n    raise", "except BaseException as e:\n    future.set_exception(e)",
    "except ImportError:\n    x = None",
]  # fmt: skip


@pytest.mark.parametrize("source", SWALLOWED + HANDED_ON)
def test_the_search_for_swallowed_errors(source):
    (handler,) = ast.parse(f"try:\n    x = run()\n{source}").body[0].handlers
    assert swallows(handler) is (source in SWALLOWED)
    assert suppressed(ast.parse("suppress(Exception)").body[0].value)
    assert not suppressed(ast.parse("suppress(OSError)").body[0].value)


def test_no_file_can_run_code():
    "Unpickling: only what a child process of our own wrote, in `processes`. Nothing is evaluated."
    for module, tree in TREES.items():
        for where, node in scopes(tree):
            if isinstance(node, ast.Call):
                name, text = ast.unparse(node.func), ast.unparse(node)
                assert not re.fullmatch(r"eval|exec|marshal\.loads?|yaml\.(unsafe_)?load|shelve\.open", name), (
                    f"{module}.{where}"
                )
                if re.fullmatch(r"(\w*\.)?torch\.load", name) and "weights_only=True" not in text:
                    assert module == "processes", f"{module}.{where}: {text}"
                if re.fullmatch(r"c?[pP]ickle\.(loads?|Unpickler)|np\.load", name):
                    assert module == "processes" and name != "np.load", f"{module}.{where}: {text}"
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names = Counter(n.id for n in ast.walk(tree) if isinstance(n, ast.Name))
        assert "pickle" not in imported or names["pickle"], f"{module} imports pickle for nothing"


def uses(trees: dict[str, ast.Module]) -> Counter[str]:
    "How often each name is read, imported, or spelled for `getattr`; a definition and its own body do not count."
    found: Counter[str] = Counter()
    for tree in trees.values():
        for where, node in scopes(tree):
            inside = set(where.split("."))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                names = [node.id]
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Call) and last_name(node) in ("getattr", "run"):  # `run(at, "forward", ...)`
                names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # a child's command line
                names = re.findall(r"\bimport (\w+)", node.value)
            else:
                continue
            found.update(name for name in names if name not in inside)
    return found


def in_text(root: Path) -> set[str]:
    "Names in notebooks' cells, other than those that define them; in tests, scripts and benchmarks."
    found: set[str] = set()
    for path in [*sorted((root / "nbs").rglob("*.ipynb")), root / "index.ipynb"]:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code" and not re.search(r"^#\| *export", text, re.MULTILINE):
                found.update(re.findall(r"\w+", text))
    for folder in ("tests", "scripts", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            found.update(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return found


def unused(trees: dict[str, ast.Module], public: dict[str, set[str]], elsewhere: set[str]) -> list[str]:
    "Functions, classes and methods that nothing needs: private ones within the package, public ones anywhere."
    used, found = uses(trees), []
    for module, tree in trees.items():
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name == "_":
                continue
            registers = any("register" in ast.unparse(d) or "custom_op" in ast.unparse(d) for d in node.decorator_list)
            shown = node.name in public.get(module, ()) and node.name in elsewhere
            if not (used[node.name] or registers or shown):
                found.append(f"{module}.{node.name}")
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                hidden = isinstance(method, ast.FunctionDef) and re.match(r"_(?!_)", method.name)
                if hidden and not used[method.name]:
                    found.append(f"{module}.{node.name}.{method.name}")
    return found


def test_no_private_name_is_unused():
    "A public name needs an example or a test; any other, somebody in the package who reads it."
    public = {module: set(importlib.import_module(f"dilated_attention_nb.{module}").__all__) for module in TREES}
    assert unused(TREES, public, in_text(ROOT)) == []


DEAD = {
    "_old": "def _old():\n    pass",
    "recursive": "def recursive(n):\n    return recursive(n - 1)",
    "A": "class A:\n    def copy(self):\n        return A()",
    "only_in_a_text": "def only_in_a_text():\n    pass\nwords = 'only_in_a_text is a function'",
    "promised": "__all__ = ['promised']\ndef promised():\n    pass",
    "B._m": "class B:\n    def _m(self):\n        pass\nb = B()",
}


@pytest.mark.parametrize("name", DEAD)
def test_the_search_finds_dead_code(name):
    "Also what calls only itself, what only a text names, what is exported and never shown."
    trees = {"wrong": ast.parse(DEAD[name])}
    assert unused(trees, {"wrong": {"promised"}}, set()) == [f"wrong.{name}"]
    if "." not in name:
        called = {"other": ast.parse(f"from wrong import {name}\n{name}()")}
        assert unused(trees | called, {}, set()) == []


def test_no_if_has_two_equal_sides():
    for module, tree in TREES.items():
        for where, node in scopes(tree):
            if isinstance(node, ast.If) and node.orelse:
                one, other = (ast.dump(ast.Module(side, [])) for side in (node.body, node.orelse))
                assert one != other, f"{module}.{where}: both sides of the if do the same"
            if isinstance(node, ast.IfExp):
                assert ast.dump(node.body) != ast.dump(node.orelse), f"{module}.{where}"


MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
CHANGES = {"append", "add", "update", "setdefault", "pop", "popitem", "clear", "extend", "insert", "remove", "discard"}


def test_no_state_in_modules_or_classes():
    "No `global`; tables at the top of a module or a class are never changed; caches of functions are bounded."
    for module, tree in TREES.items():
        assert not any(isinstance(n, ast.Global) for n in ast.walk(tree)), module
        bodies = [tree.body, *(n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]
        tables = set()
        for body in bodies:
            for node in body:
                value = getattr(node, "value", None)
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and value is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    made = isinstance(value, ast.Call) and last_name(value) in (
                        "dict",
                        "list",
                        "set",
                        "OrderedDict",
                        "deque",
                    )
                    if isinstance(value, MUTABLE) or made:
                        tables |= {t.id for t in targets if isinstance(t, ast.Name)}
        for where, node in scopes(tree):
            changed = []
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)):
                targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
                changed = [t.value for t in targets if isinstance(t, ast.Subscript)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
                changed = [node.func.value]
            for target in changed:
                assert not where or ast.unparse(target) not in tables, (
                    f"{module}.{where} changes {ast.unparse(target)}, which all share"
                )
            if isinstance(node, ast.Call) and last_name(node) == "lru_cache":
                size = [k.value for k in node.keywords if k.arg == "maxsize"]
                bounded = size and isinstance(size[0], ast.Constant) and isinstance(size[0].value, int)
                assert bounded, f"{module}.{where}: a cache without a bound"
            assert not (isinstance(node, ast.FunctionDef) and any(ast.unparse(d).split(".")[-1] == "cache"
                        for d in node.decorator_list)), f"{module}.{where}: functools.cache has no bound"  # fmt: skip


def test_no_attribute_is_read_that_nobody_sets():
    "What a method reads of `self` is set by its class, or one above; what is read of torch is there."
    roots = {"torch": torch, "nn": nn, "F": nn.functional, "dist": torch.distributed}
    for module, tree in TREES.items():
        home = importlib.import_module(f"dilated_attention_nb.{module}")
        for where, node in scopes(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in roots:
                assert hasattr(roots[node.value.id], node.attr), f"{module}.{where}: {ast.unparse(node)} does not exist"
        for node in [n for n in tree.body if isinstance(n, ast.ClassDef)]:
            cls, known = getattr(home, node.name), set()
            for base in cls.__mro__:
                known |= set(vars(base)) | set(getattr(base, "__annotations__", {}))
                if base.__module__.startswith("dilated_attention_nb"):
                    for n in ast.walk(ast.parse(inspect.cleandoc("\n" + inspect.getsource(base)))):
                        if (
                            isinstance(n, ast.Attribute)
                            and isinstance(n.ctx, ast.Store)
                            and ast.unparse(n.value) == "self"
                        ):
                            known.add(n.attr)
            slots = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            for n in ast.walk(node):
                if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load) and ast.unparse(n.value) == "self":
                    inherited = any(base.__module__.startswith("torch") for base in cls.__mro__[1:]) and hasattr(
                        nn.MultiheadAttention(8, 1), n.attr
                    )
                    assert n.attr in known | slots or inherited, (
                        f"{module}.{node.name} reads self.{n.attr}, which nobody sets"
                    )


# ---------------------------------------------------------------- signatures


def attentions() -> dict[str, type]:
    "Every module of the package whose `forward` begins with q, k, v."
    found = {}
    for module in TREES:
        home = importlib.import_module(f"dilated_attention_nb.{module}")
        for name, cls in vars(home).items():
            own = isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == home.__name__
            if own and list(inspect.signature(cls.forward).parameters)[1:4] == ["q", "k", "v"]:
                found[name] = cls
    return found


def test_signatures_agree():
    "forward(q, k, v, is_causal=False, key_padding_mask=None): what comes after may be added, by name."
    found = attentions()
    assert {
        "DilatedAttention",
        "ImprovedDilatedAttention",
        "BlockSparseAttention",
        "RingDilatedAttention",
    } <= found.keys()
    for name, cls in found.items():
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
        assert [p.name for p in parameters[:5]] == ["q", "k", "v", "is_causal", "key_padding_mask"], name
        assert parameters[3].default is False and parameters[4].default is None, name
        assert all(p.default is not p.empty for p in parameters[5:]), name


def test_tensors_have_one_layout():
    "`[b, n, h, d]` in every signature with q, k and v; `[b, h, n, d]` only where kernels are called."
    for module, tree in TREES.items():
        for where, node in scopes(tree):
            if isinstance(node, ast.FunctionDef):
                shapes = {a.arg: ast.unparse(a.annotation) for a in node.args.args if a.annotation is not None}
                for name in {"q", "k", "v"} & shapes.keys():
                    shape = re.search(r"'([\w* ]+)'", shapes[name])
                    if shape and len(parts := shape[1].split()) == 4:
                        heads_last = parts[2][0] == "h" and parts[3] == "d"
                        assert heads_last or module in {"partial", "backends"} | OTHER_SYSTEMS, (
                            f"{module}.{where}: {name} is [{shape[1]}]"
                        )


# ---------------------------------------------------------------- metadata


def classifiers() -> list[str]:
    code = "import setuptools, json; setuptools.setup = lambda **k: print(json.dumps(k['classifiers']));"
    code += " exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_pythons_agree():
    "Oldest Python of the settings, the classifiers, ruff, mypy; what CI runs is listed, its oldest is what make needs."
    oldest = METADATA["min_python"]
    listed = [c.split(" :: ")[-1] for c in classifiers() if re.search(r":: 3\.\d+$", c)]
    numbers = [tuple(map(int, v.split("."))) for v in listed]
    assert listed[0] == oldest and numbers == [(3, minor) for minor in range(numbers[0][1], numbers[-1][1] + 1)]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'target-version = "py{oldest.replace(".", "")}"' in project
    assert re.search(rf'\[tool\.mypy\]\npython_version = "{re.escape(oldest)}"', project)
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    tested = [
        p for job in workflow["jobs"].values() for p in job.get("strategy", {}).get("matrix", {}).get("python", [])
    ]
    assert tested and set(tested) == set(listed), f"CI runs {tested}, listed are {listed}"
    assert f"needs {oldest} or newer" in (ROOT / "Makefile").read_text()
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in listed
    needed = re.search(r"sys\.version_info; .*?v >= \((\d+), (\d+)\)", (ROOT / "Makefile").read_text())
    assert ".".join(needed.groups()) == min(tested, key=lambda p: int(p.split(".")[1])), (
        "make needs what CI begins with"
    )


def test_the_readme_of_an_index_has_no_relative_link():
    "Away from the repository links and pictures point into it; code is left alone."
    code = "import setuptools; setuptools.setup = lambda **k: print(k['long_description']);"
    code += " exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    here, there = (ROOT / "README.md").read_text(), done.stdout.rstrip("\n") + "\n"
    fence, link = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE), re.compile(r"\]\(([^)\s]+)\)")
    assert fence.findall(here) == fence.findall(there)
    before, after = (link.findall(fence.sub("", text)) for text in (here, there))
    assert len(before) == len(after) and all(re.match("https?://|#", target) for target in after)
    for old, new in zip(before, after):
        assert new == old or new.removeprefix(f"{METADATA['git_url']}/").split("/", 2)[2] == old


def test_flash_attn_has_no_upper_bound():
    "An extra of users excludes no newer version; only nbdev's tools, which break with them, have bounds."
    for key in ("requirements", "flash_attn_requirements", "transformers_requirements"):
        for requirement in METADATA[key].split():
            assert re.findall(RANGE, requirement) == [">="], f"{key}: {requirement}"


def test_nothing_needs_flash_attn():
    "With the package hidden, everything imports and a model runs forward and backward; only its backend imports it."
    code = (
        "import sys; sys.modules['flash_attn'] = None\n"
        "import torch\nfrom dilated_attention_nb import LongNet, LongNetConfig\n"
        "model = LongNet(LongNetConfig(32, 1, 4, segment_lengths=(8, 32), dilation_rates=(1, 2), vocab_size=16))\n"
        "tokens = torch.arange(32)[None] % 16\nmodel(tokens, tokens).backward()\nprint('trained')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "trained", done.stderr
    importing = [
        module
        for module, tree in TREES.items()
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("flash_attn")
    ]
    assert set(importing) - OTHER_SYSTEMS == {"backends"}


OPTIONAL = ["flash_attn", "xformers", "apex", "deepspeed", "torchscale", "fairscale", "transformers", "triton", "timm"]


def test_no_module_imports_what_is_optional():
    "Every module imports where none of it can be had, and asserts nothing about it."
    code = (
        f"import sys\nfor name in {OPTIONAL}:\n    sys.modules[name] = None\n"
        f"import importlib\nfor name in {sorted(set(TREES) - {'__main__'})}:\n"
        "    importlib.import_module(f'dilated_attention_nb.{name}')\nprint('imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "imported", done.stderr
    for module, tree in TREES.items():
        for where, node in scopes(tree):
            if isinstance(node, ast.Assert):
                assert not {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & {*OPTIONAL, "flash_attn_func"}, (
                    f"{module}.{where} asserts a package"
                )
