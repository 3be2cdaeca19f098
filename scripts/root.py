"""Write the package root: the names that users type, in the order and sections of the list below.

    python scripts/root.py            write dilated_attention_nb/__init__.py
    python scripts/root.py --check    fail if it is not what would be written

The list is written by hand; where a name lives is read from the modules' `__all__`, which nbdev writes. All other
public names are reached through their modules. A name that two modules export, or that is also a module's name, could
mean two things and is refused.
"""

from __future__ import annotations

import argparse
import ast
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALONE = {"benchmarks"}  # measures the others; its names may be theirs

SECTIONS = {
    "attention": """
        dilated_attention Packing attend merge available_backends block_pattern block_sparse_attention
    """,
    "modules": """
        DilatedAttention ImprovedDilatedAttention BlockSparseAttention RingDilatedAttention
        BlockSparseRingDilatedAttention create_dilated_attention
        MultiheadDilatedAttention create_multihead_dilated_attention DilatedMHA replace_attention
    """,
    "configs": """
        DilatedAttentionConfig MultiheadConfig SparseAttentionConfig RingAttentionConfig BlockSparseRingConfig
        LongNetConfig GigaPathConfig TrainingConfig DistributedConfig MemoryPoolConfig
    """,
    "models": """
        LongNet LongNetEncoder longnet_tiny longnet_125m token_losses
        GigaPathSlideEncoder slide_segment_lengths tile_cells attention_rollout
        register_with_transformers check_dilated save_pretrained from_pretrained
    """,
    "decoding": "generate KVCache DilatedKVCache LongNetCache JoinedCache",
    "data and training": "to_bytes to_tokens read_corpus bits_per_byte fit train load_run train_elastic",
    "distributed": """
        shard_sequence gather_sequence share_in_ring LongNetShare DistributedLongNet Cluster UnifiedMemoryPool
    """,
    "testing": """
        make_qkv oracle_attention check_against_oracle AttentionCase attention_cases assert_causal spawn_gloo
    """,
}

TEMPLATE = '''"""{description}.

The names that users type stand here: `from dilated_attention_nb import dilated_attention`. A module is imported when
one of its names is first used, so that plots, training or testing cost nothing to those who only attend. All other
public names are reached through their modules.
"""

# Written by scripts/root.py, which holds the list of names: run `make export` after a change.

from importlib import import_module, resources
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "{version}"

if TYPE_CHECKING:
{typed}
_HOME = {{
{homes}}}

__all__ = [
    "__version__",
{exported}]


if not TYPE_CHECKING:  # or every name would pass for one of ours

    def __getattr__(name: str) -> Any:
        "Find a public name, or a module, on first use (PEP 562). Raises `ImportError` for names of modules alone."
        if name in _HOME:
            globals()[name] = value = getattr(import_module(f"{{__name__}}.{{_HOME[name]}}"), name)
            return value
        if not name.startswith("_"):
            if find_spec(f"{{__name__}}.{{name}}"):
                return import_module(f"{{__name__}}.{{name}}")
            for file in sorted(resources.files(__name__).iterdir(), key=lambda file: file.name):
                lists = file.read_text("utf-8").partition("\\n__all__ = [")[2] if file.name.endswith(".py") else ""
                if file.name != "__init__.py" and repr(name) in lists.partition("]")[0]:
                    home = f"{{__name__}}.{{file.name[:-3]}}"
                    raise ImportError(f"{{name}} isn't at the package root: from {{home}} import {{name}}")
        raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")


def __dir__() -> list[str]:
    return sorted(__all__)
'''


def settings(root: Path = ROOT) -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def public_names(path: Path) -> list[str]:
    "The `__all__` of the module at `path`, read without importing it."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def collect(package: Path) -> dict[str, str]:
    "The module of each public name."
    modules = sorted(path for path in package.glob("*.py") if not path.stem.startswith("_"))
    homes: dict[str, str] = {}
    for path in modules:
        for name in [] if path.stem in ALONE else public_names(path):
            if (package / f"{name}.py").exists():
                raise SystemExit(f"{path.stem} exports {name!r}, which is also a module: give one of them another name")
            if name in homes:
                both = f"{homes[name]} and {path.stem} both export {name!r}"
                raise SystemExit(f"{both}: make one private (_{name}) or rename it")
            homes[name] = path.stem
    return homes


def typed_import(home: str, name: str) -> str:
    "As a type checker reads it: `as` makes it public."
    line = f"    from {home} import {name} as {name}\n"
    return line if len(line) < 122 else f"    from {home} import (\n        {name} as {name},\n    )\n"


def render(root: Path = ROOT) -> str:
    "The text of `__init__.py`."
    cfg = settings(root)
    package = cfg["lib_path"]
    homes = collect(root / package)
    modules = sorted({*homes.values()})
    typed = "".join(f"    from {package} import {module} as {module}\n" for module in modules)
    table = exported = ""
    for section, text in SECTIONS.items():
        names = [name for name in text.split() if name in homes]
        typed += "".join(typed_import(f"{package}.{homes[name]}", name) for name in names)
        table += f"    # {section}\n" + "".join(f'    "{name}": "{homes[name]}",\n' for name in names)
        exported += f"    # {section}\n" + "".join(f'    "{name}",\n' for name in names)
    return TEMPLATE.format(
        description=cfg["description"], version=cfg["version"], typed=typed, homes=table, exported=exported
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file differs")
    args = parser.parse_args()
    path = ROOT / settings()["lib_path"] / "__init__.py"
    old, new = path.read_text(encoding="utf-8") if path.exists() else "", render()
    if old == new:
        return 0
    if args.check:
        print(f"{path.relative_to(ROOT)} does not list the modules' public names: run `make export`", file=sys.stderr)
        return 1
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
