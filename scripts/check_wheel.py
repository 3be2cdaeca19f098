"""Build the sdist, of it the wheel, and install that where there is no nbdev: import every module, run the README's
lines and the report.

    python scripts/check_wheel.py             alone, then with each extra; nothing is downloaded
    python scripts/check_wheel.py --online    also: does each extra resolve against the package index?

`pip install` puts the wheel into new environments, each beside links to the packages that the wheel declares as
requirements (and theirs) and to no others. So an import or an extra that settings.ini does not account for fails here.
flash-attn needs CUDA to be built: where it is not installed, pip must miss it and nothing else.
"""

from __future__ import annotations

import argparse
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
TOOLING = {"dev", "docs"}  # extras for work on the library; the others add something to use
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
    """The wheel, as pip builds it from the sdist: what the sdist lacks, the wheel and every installation lack too.

    The sdist is made of a copy: a build/ folder left behind would bring deleted modules back.
    """
    copy_tree(ROOT, folder / "source")
    sdist = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, folder / "source"]
    run(sdist, folder, "building the sdist")
    offline = "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"
    wheel = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, next(folder.glob("*.tar.gz"))]
    run(wheel, folder, "pip wheel of the sdist")
    return next(folder.glob("*.whl"))


def requirements(lines: list[str], extra: str = "") -> tuple[dict[str, metadata.Distribution], list[str]]:
    "The installed distributions that lines of metadata ask for, directly or not; and the names of those missing."
    found: dict[str, metadata.Distribution] = {}
    missing, seen, todo = [], set(), [(line, {"", extra}) for line in lines]
    while todo:
        line, extras = todo.pop()
        requirement = Requirement(line)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": name}) for name in extras):
            continue
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        wanted = {"", *requirement.extras} - {name for known, name in seen if known == key}
        if not wanted:
            continue
        seen |= {(key, name) for name in wanted}
        try:
            found[key] = metadata.distribution(requirement.name)
            todo += [(needed, wanted) for needed in found[key].requires or []]
        except metadata.PackageNotFoundError:
            missing.append(key)
    return found, missing


def link(distribution: metadata.Distribution, site: Path) -> None:
    "Link a distribution's files into the environment's site-packages."
    files = distribution.files or []
    for name in {file.parts[0] for file in files if ".." not in file.parts and file.parts[0] != "__pycache__"}:
        source = Path(str(distribution.locate_file(name)))
        if source.exists() and not (site / name).exists():
            (site / name).symlink_to(source)


def run(command: list[object], cwd: Path, what: str, status: int = 0) -> str:
    "Run a program, which must end with `status`; returns all that it prints."
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=1800)
    if done.returncode != status:
        raise SystemExit(f"{what} failed, status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def environment(home: Path, distributions: dict[str, metadata.Distribution]) -> Path:
    "A new environment with links to some installed packages; returns its Python. It has no pip: ours works on it."
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run([python, "-I", "-c", where], home, "python").strip())
    for distribution in distributions.values():
        link(distribution, site)
    return python


def pip(python: Path, *options: object) -> list[object]:
    return [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", *options]


def use(python: Path, folder: Path) -> dict[str, str]:
    "What `python -m dilated_attention_nb` reports in an environment."
    printed = run([python, "-I", "-m", PACKAGE, "--device", "cpu"], folder, f"python -m {PACKAGE}")
    return {line[:21].strip(): line[21:].strip() for line in printed.splitlines()}


def stand_in(name: str, version: str, folder: Path) -> None:
    "An empty wheel with that name and version, for pip to resolve."
    stem = f"{name.replace('-', '_')}-{version}"
    about = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
    about |= {"WHEEL": "Wheel-Version: 1.0\nGenerator: check_wheel\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for file, text in about.items():
            archive.writestr(f"{stem}.dist-info/{file}", text)
        lines = "".join(f"{stem}.dist-info/{file},,\n" for file in (*about, "RECORD"))
        archive.writestr(f"{stem}.dist-info/RECORD", lines)


def check_extra(wheel: Path, declared: list[str], extra: str, folder: Path) -> str:
    "Install the wheel with an extra in an environment of its own; what came of it, in words."
    found, missing = requirements(declared, extra)
    python = environment(folder / f"env-{extra}", found)
    install = pip(python, "--no-index", "--quiet", f"{wheel}[{extra}]")
    if not missing:
        run(install, folder, f"pip install with [{extra}]")
        if extra in TOOLING:
            return "installed"
        said = use(python, folder)[f"extra {extra}"]
        if not said.startswith("available"):
            raise SystemExit(f"installed with [{extra}], yet the report says: {said}")
        return f"installed, the report says {said}"
    if missing != ["flash-attn"]:
        how = f"{sys.executable} -m pip install -c constraints.txt {' '.join(missing)}"
        raise SystemExit(f"[{extra}] needs {', '.join(missing)}, not installed here, so it can't be checked: {how}")
    refusal = run(install, folder, f"pip install with [{extra}] and without {missing[0]}", 1)
    if "No matching distribution found for flash-attn" not in refusal:
        raise SystemExit(f"[{extra}] was refused for another reason than {missing[0]}:\n{refusal}")
    stand_in(missing[0], "2.8.3", folder)
    run(
        pip(python, "--no-index", "--quiet", "--find-links", folder, f"{wheel}[{extra}]"),
        folder,
        "resolving flash-attn",
    )
    return "missed flash-attn alone, resolved with a stand-in for it"


def readme_lines() -> str:
    "The README's first Python block."
    match = re.search(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    if not match:
        raise SystemExit("README.md shows no Python")
    return match[1]


def resolved(wheel: Path, declared: list[str], extra: str, folder: Path) -> str:
    "Let pip resolve the wheel with an extra against the package index, without installing; what came of it, in words."
    if extra == "flash-attn":  # from source alone: even to learn what it needs, pip would have to begin its build
        (wanted,) = (Requirement(line) for line in declared if line.startswith(extra))
        listed = run([sys.executable, "-m", "pip", "index", "versions", extra], folder, f"asking for {extra} online")
        newest = re.search(rf"^{extra} \((\S+)\)", listed, re.MULTILINE)
        if not newest or newest[1] not in wanted.specifier:
            raise SystemExit(f"the index offers no {extra}{wanted.specifier}:\n{listed}")
        return f"the newest is {newest[1]}, which {wanted.specifier} lets in; it would be built from source"
    python = environment(folder / f"online-{extra}", {})
    install = pip(python, "--dry-run", "-c", ROOT / "constraints.txt", f"{wheel}[{extra}]")
    said = run(install, folder, f"resolving [{extra}] online")
    would = next(line for line in said.splitlines() if line.startswith("Would install"))
    return f"{len(would.split()) - 2} packages would be installed"


def contents(wheel: Path) -> list[str]:
    "Check the wheel's files: the package as it stands here, marked as typed, alone. Returns what it requires."
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        declared = archive.read(next(n for n in inside if n.endswith("METADATA"))).decode()
    wanted = {f"{PACKAGE}/{p.name}" for p in (ROOT / PACKAGE).glob("*.py")} | {f"{PACKAGE}/py.typed"}
    modules = {name for name in inside if name.startswith(f"{PACKAGE}/")}
    if modules != wanted:
        raise SystemExit(f"the wheel holds other files than the package: {sorted(modules ^ wanted)}")
    strangers = {n.split("/")[0] for n in inside if ".dist-info" not in n} - {PACKAGE}
    if strangers:
        raise SystemExit(f"the wheel installs more than the package: {sorted(strangers)}")
    return re.findall(r"^Requires-Dist: (.+)$", declared, re.MULTILINE)


def check_alone(wheel: Path, declared: list[str], folder: Path) -> str:
    "Install the wheel without extras and use it; what came of it, in words."
    found, missing = requirements(declared)
    if missing:
        raise SystemExit(f"required but not installed here: {', '.join(missing)}")
    python = environment(folder / "env", found)
    run(pip(python, "--no-index", "--quiet", wheel), folder, "pip install")
    probe = PROBE.format(package=PACKAGE, tools=TOOLS)
    counts = run([python, "-I", "-c", probe], folder, "importing the modules").split()
    lines = readme_lines()
    shown = run([python, "-I", "-c", lines], folder, "the README's example").strip()
    report = use(python, folder)
    offered = {name for name in report if name.startswith("extra ")}
    installed = {name for name in offered if report[name].startswith("available")}
    surprising = installed - {f"extra {name}" for name in found}  # PyTorch for CUDA brings Triton
    if not offered or surprising or not report["self-check"].startswith("passed"):
        raise SystemExit(f"the report of an installation without extras: {report}")
    return (f"{counts[0]} modules and {counts[1]} names imported without nbdev; the README's {len(lines.splitlines())} "
            f"lines print {shown}; self-check {report['self-check']}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--online", action="store_true", help="let pip resolve each extra against the package index")
    online = parser.parse_args().online
    with tempfile.TemporaryDirectory(prefix="check-wheel-") as tmp:
        folder = Path(tmp)
        wheel = build(folder)
        declared = contents(wheel)
        print(f"wheel: {wheel.name}, {check_alone(wheel, declared, folder)}", flush=True)
        extras = sorted({found for line in declared for found in re.findall(r"extra == ['\"]([\w-]+)", line)})
        for extra in extras:
            print(f"with [{extra}]: {check_extra(wheel, declared, extra, folder)}", flush=True)
        for extra in extras if online else ():
            print(f"with [{extra}], online: {resolved(wheel, declared, extra, folder)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
