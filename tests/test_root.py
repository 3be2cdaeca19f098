"""The package root: short, lazy, typed."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_scripts import load

import dilated_attention_nb

PACKAGE = Path(dilated_attention_nb.__file__).parent
MODULES = sorted(m.name for m in pkgutil.iter_modules([str(PACKAGE)]) if not m.name.startswith("_"))
ALONE = {"benchmarks"}  # measures the others; its names are looked up in the module


def public_names(module: str) -> list[str]:
    return list(importlib.import_module(f"dilated_attention_nb.{module}").__all__)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_and_its_names_are_found_from_the_root(module):
    "Those of the list are there; an import of another one says where it lives."
    home = importlib.import_module(f"dilated_attention_nb.{module}")
    assert getattr(dilated_attention_nb, module) is home
    for name in () if module in ALONE else public_names(module):
        if name in dilated_attention_nb.__all__:
            assert getattr(dilated_attention_nb, name) is getattr(home, name), name
        else:
            with pytest.raises(ImportError, match=f"from dilated_attention_nb.{module} import {name}$"):
                exec(f"from dilated_attention_nb import {name}")


def test_the_root_has_what_users_type_and_no_more():
    assert 50 <= len(dilated_attention_nb.__all__) <= 75 and dilated_attention_nb.__all__[1] == "dilated_attention"
    names = [name for text in load("root").SECTIONS.values() for name in text.split()]
    assert dilated_attention_nb.__all__ == ["__version__", *names]
    assert dir(dilated_attention_nb) == sorted(dilated_attention_nb.__all__)
    assert all(hasattr(dilated_attention_nb, name) for name in dilated_attention_nb.__all__)
    for name in ("dilated_atention", "_dilated_attention", "a'b", ""):
        with pytest.raises(AttributeError, match=f"no attribute {name!r}".replace("\\", ".")):
            getattr(dilated_attention_nb, name)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_root_imports_nothing_else():
    heavy = ("torch", "matplotlib", "numpy", "nbdev", "fastcore", "execnb", "IPython", "tqdm", "safetensors")
    assert run(f"import sys, dilated_attention_nb; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_attention_needs_neither_plots_nor_notebook_tools():
    heavy = ("matplotlib", "nbdev", "fastcore", "execnb", "IPython")
    code = "import sys; from dilated_attention_nb import dilated_attention; "
    assert run(code + f"print([m for m in {heavy} if m in sys.modules])") == "[]"


# What takes long to import and what attention alone has no use for. PyTorch imports some of it itself.
HEAVY = (
    "matplotlib", "transformers", "triton", "flash_attn", "safetensors", "hypothesis", "tqdm", "IPython", "nbdev",
    "fastcore", "execnb", "pytest", "scipy", "pandas", "sympy", "networkx", "torch._dynamo", "torch._inductor",
    "torch.fx.experimental.symbolic_shapes", "torch.nn.attention.flex_attention", "torch.utils.tensorboard",
    "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.rpc",
    "torch.distributed.pipelining", "torch.distributed.elastic", "torch.distributed.run",
)  # fmt: skip


@pytest.mark.parametrize(
    ("names", "needs"),
    [("", ()), ("dilated_attention", ()), ("LongNet", ("safetensors", "torch.nn.attention.flex_attention"))],
)
def test_an_import_adds_nothing_heavy_to_torch(names, needs):
    "What makes it add less than 0.3 s (benchmarks/package.json), as something that no busy machine can change."
    line = f"from dilated_attention_nb import {names}" if names else "import dilated_attention_nb"
    code = f"import sys, torch; before = set(sys.modules); {line}; print(*sorted(set(sys.modules) - before))"
    added = run(code).split()
    assert "dilated_attention_nb" in added
    heavy = set(HEAVY) - set(needs)
    assert not [m for m in added if m in heavy or m.split(".")[0] in heavy]
    own = {"dilated_attention_nb", "jaxtyping", "einops", "numpy", "torch"} | sys.stdlib_module_names
    assert not {m.split(".")[0] for m in added} - own - set(needs)


@pytest.mark.parametrize("module", MODULES)
def test_public_callables_are_documented(module):
    home = importlib.import_module(f"dilated_attention_nb.{module}")
    public = [getattr(home, name) for name in home.__all__]
    bare = [o.__name__ for o in public if (inspect.isfunction(o) or inspect.isclass(o)) and not inspect.getdoc(o)]
    assert not bare


def test_version_is_that_of_the_settings():
    from configparser import ConfigParser

    parser = ConfigParser(delimiters=["="])
    parser.read(PACKAGE.parent / "settings.ini")
    assert dilated_attention_nb.__version__ == parser["DEFAULT"]["version"]


def test_the_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").exists()
