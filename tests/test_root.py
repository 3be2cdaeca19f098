"""The package root: complete, lazy, typed."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dilated_attention_nb

PACKAGE = Path(dilated_attention_nb.__file__).parent
MODULES = sorted(m.name for m in pkgutil.iter_modules([str(PACKAGE)]) if not m.name.startswith("_"))
ALONE = {"benchmarks"}  # measures the others; its names are looked up in the module


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_at_the_root(module):
    home = importlib.import_module(f"dilated_attention_nb.{module}")
    assert getattr(dilated_attention_nb, module) is home
    for name in () if module in ALONE else home.__all__:
        assert getattr(dilated_attention_nb, name) is getattr(home, name), name
        assert name in dilated_attention_nb.__all__ and name in dir(dilated_attention_nb)


def test_the_root_promises_nothing_that_is_not_there():
    exported = {
        name
        for module in sorted({*MODULES} - ALONE)
        for name in importlib.import_module(f"dilated_attention_nb.{module}").__all__
    }
    assert set(dilated_attention_nb.__all__) == exported | {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'dilated_atention'"):
        dilated_attention_nb.dilated_atention  # noqa: B018


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
