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

# A softmax that is no attention, and why.
OTHER_SOFTMAXES = {
    "kept_logits": "probabilities of tokens",
    "draw_tokens": "probabilities of tokens",
    "block_shares": "what a scorer of blocks should learn; computes no output",
    "scorer_loss": "a cross-entropy",
    "losses_op": "the logsumexp of a cross-entropy",
}
# The definition that everything is judged by, and what stands beside it on purpose.
JUDGES = {"testing"}
OTHER_SYSTEMS = {"benchmarks"}  # what is compared with in measurements
NAMED = {"_compiled_flex", "_flex"}  # block-sparse attention by FlexAttention, only if it is named


def test_one_place_that_computes_attention():
    "Fused kernels and softmaxes over keys: in `partial` alone."
    kernels = calls(r"_?scaled_dot_product\w*|_flash_attn_\w+|flash_attn\w*func|memory_efficient_attention")
    assert modules_of(kernels) - OTHER_SYSTEMS == {"partial"}
    flexible = calls(r"flex_attention") | {
        f"{module}.{where}"
        for module, tree in TREES.items()
        for where, node in scopes(tree)
        if isinstance(node, ast.Name) and node.id == "flex_attention" and isinstance(node.ctx, ast.Load)
    }
    outside = {name for name in flexible if name.split(".")[0] not in OTHER_SYSTEMS}
    assert without_modules(outside) <= NAMED, f"FlexAttention outside of what names it: {outside}"
    softmaxes = calls(r"(log_)?softmax_?|logsumexp|_softmax")
    strange = {n for n in softmaxes if n.split(".")[0] not in JUDGES | OTHER_SYSTEMS | {"partial"}}
    unexplained = {n for n in strange if n.split(".", 1)[1] not in OTHER_SOFTMAXES}
    assert not unexplained, f"a softmax outside of partial: {unexplained}; use partial, or say in this test what it is"


def test_one_place_that_scores():
    "Products of all queries with all keys, written as an einsum: `partial`, its judge, and the scorer of blocks."
    found = set()
    for module, tree in TREES.items():
        for where, node in scopes(tree):
            if isinstance(node, ast.Call) and last_name(node) == "einsum" and node.args:
                spec = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
                if re.search(r"->.*ij$", str(spec).replace(" ", "")):
                    found.add(f"{module}.{where}")
    strange = {n for n in found if n.split(".")[0] not in JUDGES | OTHER_SYSTEMS | {"partial"}}
    assert {n.split(".")[-1] for n in strange} <= {"scorer_loss", "choose"}, strange


def test_one_place_for_grids_and_merges():
    "Partial softmaxes are merged in `partial`; grids are cut in `masking`."
    merging = calls(r"logaddexp2?|softplus|logcumsumexp") | {
        n for n in calls(r"sigmoid") if n.split(".")[0] in ("partial", "improved", "dilated", "ring", "decoding")
    }
    assert modules_of(merging) - OTHER_SYSTEMS == {"partial"}, merging
    lerps = calls(r"lerp_?")  # out rows, with weights that `partial` made
    weighted = calls(r"merge_lse_")
    for name in lerps:
        module, where = name.split(".", 1)
        asks = any(other.split(".")[0] == module for other in weighted)
        assert module == "partial" or asks, f"{name} merges with weights of its own"
    steps = {
        f"{module}.{where}"
        for module, tree in TREES.items()
        for where, node in scopes(tree)
        if isinstance(node, ast.Slice)
        and node.step is not None
        and not isinstance(node.step, (ast.Constant, ast.UnaryOp))
        and "heads" not in ast.unparse(node)
    }
    strange = {n for n in steps if n.split(".")[0] not in {"masking"} | OTHER_SYSTEMS}
    # A cache of one segment keeps the grid in slots: token i in slot (i mod w) // r.
    assert {n.split(".", 1)[1] for n in strange} <= {"_Branch.store", "_Branch.parts"}, (
        f"a grid outside of masking: {steps}"
    )
    for name in ("branch_heads", "head_groups", "grid_pairs", "tiles", "causal_mask", "Grid"):
        homes = [m for m, tree in TREES.items() for n in tree.body if getattr(n, "name", "") == name]
        assert homes == ["masking"], (name, homes)


def test_the_search_finds_a_second_way():
    "Each of these would be found."
    second = {
        "ring": ast.parse("def attend_chunk(q, k, v):\n    return (q @ k.mT).softmax(-1) @ v"),
        "improved": ast.parse("def other(q):\n    return torch.nn.functional.scaled_dot_product_attention(q, q, q)"),
    }
    assert calls(r"(log_)?softmax_?", second) == {"ring.attend_chunk"}
    assert calls(r"_?scaled_dot_product\w*", second) == {"improved.other"}


def test_layers_import_downwards():
    spec = importlib.util.spec_from_file_location("check_imports", ROOT / "scripts/check_imports.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert module.check(ROOT) == []


def test_classes_stay_small():
    "A class for everything is longer than this; so is a function."
    for module, tree in TREES.items():
        for where, node in scopes(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                limit = 250 if isinstance(node, ast.ClassDef) else 100
                assert node.end_lineno - node.lineno < limit, (
                    f"{module}.{where} has {node.end_lineno - node.lineno} lines"
                )


# ---------------------------------------------------------------- what must not be


def handlers():
    return [
        (f"{module}.{where}", node)
        for module, tree in TREES.items()
        for where, node in scopes(tree)
        if isinstance(node, ast.ExceptHandler)
    ]


def test_no_except_catches_everything():
    "None is bare; a broad one hands the error on."
    for where, handler in handlers():
        assert handler.type is not None, f"a bare except in {where}"
        kinds = {ast.unparse(kind) for kind in getattr(handler.type, "elts", [handler.type])}
        if kinds & {"Exception", "BaseException"}:
            body = ast.unparse(ast.Module(handler.body, []))
            handed_on = any(isinstance(n, ast.Raise) for n in ast.walk(handler))
            assert (
                handed_on or "set_exception" in body or "format_exc" in body or handler.name and handler.name in body
            ), f"{where} swallows everything"


def test_no_file_can_run_code():
    "Unpickling: only what a child process of our own wrote, in `testing`. Nothing is evaluated."
    for module, tree in TREES.items():
        for where, node in scopes(tree):
            if isinstance(node, ast.Call):
                name, text = ast.unparse(node.func), ast.unparse(node)
                assert not re.fullmatch(r"eval|exec|marshal\.loads?|yaml\.(unsafe_)?load|shelve\.open", name), (
                    f"{module}.{where}"
                )
                if re.fullmatch(r"(\w*\.)?torch\.load", name) and "weights_only=True" not in text:
                    assert module in JUDGES, f"{module}.{where}: {text}"
                if re.fullmatch(r"c?[pP]ickle\.(loads?|Unpickler)|np\.load", name):
                    assert module in JUDGES and name != "np.load", f"{module}.{where}: {text}"
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names = Counter(n.id for n in ast.walk(tree) if isinstance(n, ast.Name))
        assert "pickle" not in imported or names["pickle"], f"{module} imports pickle for nothing"


def test_no_private_name_is_unused():
    "Functions, classes and methods of the package that nothing in the package uses and nobody outside is offered."
    used: Counter[str] = Counter()
    for tree in TREES.values():
        for node in ast.walk(tree):
            used.update(
                [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else []
            )
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 400:
                used.update(re.findall(r"\w+", node.value))  # by name: getattr, schedules, a child's command line
            if isinstance(node, ast.ImportFrom):
                used.update(alias.name for alias in node.names)
    for module, tree in TREES.items():
        public = set(importlib.import_module(f"dilated_attention_nb.{module}").__all__)
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name == "_":
                continue
            registered = node.name in public or node.decorator_list
            assert registered or used[node.name], f"{module}.{node.name} is defined and never used"
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                hidden = isinstance(method, ast.FunctionDef) and re.match(r"_(?!_)", method.name)
                assert not hidden or used[method.name], f"{module}.{node.name}.{method.name} is never used"


def ruff(*options: str) -> str:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", *options]
    return subprocess.run([*command, "dilated_attention_nb"], cwd=ROOT, capture_output=True, text=True).stdout


def test_no_code_in_comments():
    assert "All checks passed" in (found := ruff("--select", "ERA001")), found


def test_names_have_one_style():
    "snake_case for functions, arguments and variables, CapWords for classes. N812 is `import functional as F`."
    kernels = "triton_*.py:N803"  # what is constant when a kernel is compiled is written in capitals there
    found = ruff("--select", "N", "--ignore", "N812", "--per-file-ignores", kernels)
    assert "All checks passed" in found, found


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


def test_no_mutable_defaults():
    for module, tree in TREES.items():
        for where, node in scopes(tree):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
                    made = isinstance(default, ast.Call) and last_name(default) in (
                        "list",
                        "dict",
                        "set",
                        "zeros",
                        "empty",
                    )
                    assert not isinstance(default, MUTABLE) and not made, f"{module}.{where}: a default that can change"


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
    "`[b, n, h, d]` in every signature with q, k and v; `[b, h, n, d]` only where kernels are called, in `partial`."
    for module, tree in TREES.items():
        for where, node in scopes(tree):
            if isinstance(node, ast.FunctionDef):
                shapes = {a.arg: ast.unparse(a.annotation) for a in node.args.args if a.annotation is not None}
                for name in {"q", "k", "v"} & shapes.keys():
                    shape = re.search(r"'([\w* ]+)'", shapes[name])
                    if shape and len(parts := shape[1].split()) == 4:
                        heads_last = parts[2][0] == "h" and parts[3] == "d"
                        assert heads_last or module in {"partial"} | OTHER_SYSTEMS, (
                            f"{module}.{where}: {name} is [{shape[1]}]"
                        )


# ---------------------------------------------------------------- metadata


def classifiers() -> list[str]:
    code = "import setuptools, json; setuptools.setup = lambda **k: print(json.dumps(k['classifiers']));"
    code += " exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_pythons_agree():
    "The oldest Python of the settings, the classifiers, ruff, mypy; and what CI runs is what is listed."
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


def test_the_readme_of_an_index_has_no_relative_link():
    "Away from the repository links and pictures point into it; code is left alone."
    code = "import setuptools; setuptools.setup = lambda **k: print(k['long_description']);"
    code += " exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    here, there = (ROOT / "README.md").read_text(), done.stdout.rstrip("\n") + "\n"
    fence, link = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE), re.compile(r"\]\(([^)\s]+)\)")
    assert fence.findall(here) == fence.findall(there)
    before, after = (link.findall(fence.sub("", text)) for text in (here, there))
    assert len(before) == len(after) > 20 and all(re.match("https?://|#", target) for target in after)
    for old, new in zip(before, after):
        assert new == old or new.removeprefix(f"{METADATA['git_url']}/").split("/", 2)[2] == old


def test_flash_attn_has_no_upper_bound():
    "An extra of users excludes no newer version; only nbdev's tools, which break with them, have bounds."
    for key in ("requirements", "flash_attn_requirements", "transformers_requirements"):
        for requirement in METADATA[key].split():
            assert re.findall(RANGE, requirement) == [">="], f"{key}: {requirement}"


def test_nothing_needs_flash_attn():
    "With the package hidden, everything imports and a step of training runs; it is named nowhere but in its backend."
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
    assert set(importing) - OTHER_SYSTEMS == {"partial"}


@pytest.mark.parametrize("name", ["ERA001", "N806"])
def test_the_linter_finds_what_is_wrong(name, tmp_path):
    bad = {"ERA001": "# x = compile(model)\ny = 1\n", "N806": "def f():\n    blockSize = 1\n    return blockSize\n"}
    (tmp_path / "bad.py").write_text(bad[name])
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--select", name, str(tmp_path)]
    assert name in subprocess.run(command, capture_output=True, text=True).stdout
