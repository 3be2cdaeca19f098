"""Build the wheel and use it where there is no nbdev: import every module, run the README's lines.

    python scripts/check_wheel.py

The wheel goes into a new environment, beside links to the packages that it declares as requirements (and theirs) and
to no others. So an import that settings.ini does not account for fails here, and nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata as metadata
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from check_export import copy_tree
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dilated_attention_nb"
TOOLS = ("nbdev", "fastcore", "execnb", "IPython", "jupyterlab", "pytest")

PROBE = """
import importlib, importlib.util, pathlib, pkgutil, sys
import {package}
there = pathlib.Path({package}.__file__).parent
assert "site-packages" in there.parts, there
assert not any(m in sys.modules for m in ("torch", "matplotlib")), "the root imports more than it needs"
for tool in {tools}:
    assert importlib.util.find_spec(tool) is None, f"{{tool}} can be imported here: the check would prove nothing"
modules = sorted(m.name for m in pkgutil.walk_packages([str(there)], "{package}."))
for name in modules:
    importlib.import_module(name)
for name in {package}.__all__:
    getattr({package}, name)
print(len(modules), len({package}.__all__))
"""


def build(folder: Path) -> Path:
    "The wheel, built in a copy: a build/ folder left behind would bring deleted modules back."
    copy_tree(ROOT, folder / "source")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), f"{folder}/source"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the wheel could not be built:\n{done.stdout}{done.stderr}")
    return next(folder.glob("*.whl"))


def requirements(names: list[str]) -> dict[str, metadata.Distribution]:
    "The installed distributions that `names` need, directly or not, without extras."
    found: dict[str, metadata.Distribution] = {}
    todo = list(names)
    while todo:
        requirement = Requirement(todo.pop())
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if key in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[key] = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            raise SystemExit(f"{requirement} is required but not installed here") from None
        todo += found[key].requires or []
    return found


def link(distribution: metadata.Distribution, site: Path) -> None:
    "Link a distribution's files into the environment's site-packages."
    files = distribution.files or []
    for name in {file.parts[0] for file in files if ".." not in file.parts and file.parts[0] != "__pycache__"}:
        source = Path(str(distribution.locate_file(name)))
        if source.exists() and not (site / name).exists():
            (site / name).symlink_to(source)


def run(python: Path, code: str, cwd: Path, what: str) -> str:
    done = subprocess.run([str(python), "-I", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{code}\n{done.stdout}{done.stderr}")
    return done.stdout


def readme_lines() -> str:
    "The README's first Python block."
    match = re.search(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    if not match:
        raise SystemExit("README.md shows no Python")
    return match[1]


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="check-wheel-") as tmp:
        folder = Path(tmp)
        wheel = build(folder)
        with zipfile.ZipFile(wheel) as archive:
            inside = set(archive.namelist())
            declared = archive.read(next(n for n in inside if n.endswith("METADATA"))).decode()
        wanted = {f"{PACKAGE}/{p.name}" for p in (ROOT / PACKAGE).glob("*.py")} | {f"{PACKAGE}/py.typed"}
        modules = {name for name in inside if name.startswith(f"{PACKAGE}/")}
        if modules != wanted:
            raise SystemExit(f"the wheel holds other files than the package: {sorted(modules ^ wanted)}")
        strangers = (
            {n.split("/")[0] for n in inside} - {PACKAGE} - {n.split("/")[0] for n in inside if ".dist-info" in n}
        )
        if strangers:
            raise SystemExit(f"the wheel installs more than the package: {sorted(strangers)}")
        home = folder / "env"
        venv.create(home, with_pip=False, symlinks=True)
        python = home / "bin" / "python"
        site = Path(run(python, "import sysconfig; print(sysconfig.get_path('purelib'))", folder, "python").strip())
        for distribution in requirements(re.findall(r"^Requires-Dist: (.+)$", declared, re.MULTILINE)).values():
            link(distribution, site)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        counts = run(python, PROBE.format(package=PACKAGE, tools=TOOLS), folder, "importing the modules").split()
        lines = readme_lines()
        shown = run(python, lines, folder, "the README's example").strip()
        print(f"wheel: {wheel.name}, {counts[0]} modules and {counts[1]} names imported without nbdev; "
              f"the README's {len(lines.splitlines())} lines print {shown}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
