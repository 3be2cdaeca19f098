"""Keep the pages of defects (nbs/[0-9]*_defects*.ipynb) in step with the layers and tests that they name.

    python scripts/defects.py            mend links to layers and ids of tests
    python scripts/defects.py --check    write nothing; say what is stale or leads nowhere

A section is a markdown cell with a heading `### ...` and the lines `- **From:** ...`, `- **It did:** ...`,
`- **Layer:** [name](notebook#anchor)`, `- **Guard:** ...` (ids of tests, each in backticks). All other defects are rows
of tables whose last column is the guard. A test or an anchor that moved to another file is found there and the line is
mended; one that is nowhere, or in two places, is reported.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("From", "It did", "Layer", "Guard")
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+\.ipynb)(#[^)\s]+)?\)")
NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROW = re.compile(r"^\| (?!defect \|)([^|]+) \|.* \| ([^|]+) \|$", re.MULTILINE)


def slug(heading: str) -> str:
    "The anchor that the site gives a heading."
    text = re.sub(r"[`*_]|\$[^$]*\$", "", heading).strip().lower()
    text = re.sub(r"[^\w\s.-]", "", text)
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text))


@cache
def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


@cache
def anchors(path: Path) -> dict[str, str]:
    "Anchor and heading of every heading of a notebook."
    lines = [line for c in cells(path) if c["cell_type"] == "markdown" for line in source(c).splitlines()]
    return {slug(m[1]): m[1] for line in lines if (m := re.match(r"#+\s+(.*)", line))}


@cache
def tests(root: Path) -> dict[str, set[str]]:
    "The functions `test_...` of each test file, by its path from the root."
    found = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test")}
        found[path.relative_to(root).as_posix()] = names
    return found


def layers(root: Path) -> list[Path]:
    "The numbered notebooks, without the catalogue itself."
    return [p for p in sorted((root / "nbs").glob("[0-9]*_*.ipynb")) if "_defects" not in p.name]


def catalogue(root: Path) -> list[Path]:
    return sorted((root / "nbs").glob("[0-9]*_defects*.ipynb"))


@dataclass
class Section:
    "One defect, as its markdown cell tells it."

    path: Path
    cell: str
    title: str
    fields: dict[str, str]

    @property
    def where(self) -> str:
        return f"{self.path.name}, '{self.title}'"


def sections(path: Path) -> list[Section]:
    "The defects of a notebook."
    found = []
    for c in cells(path):
        head = re.search(r"^### (.+)$", source(c), re.MULTILINE) if c["cell_type"] == "markdown" else None
        if head:
            lines = re.findall(r"^- \*\*([^*]+):\*\* (.+)$", source(c), re.MULTILINE)
            found.append(Section(path, c["id"], head[1].strip(), dict(lines)))
    return found


def mended_link(root: Path, where: str, name: str, file: str, anchor: str | None) -> tuple[str, str]:
    "A link to a layer as it should be, and what is wrong with it."
    target = root / "nbs" / file
    if target.exists() and (anchor is None or anchor[1:] in anchors(target)):
        return f"[{name}]({file}{anchor or ''})", ""
    if anchor is None:
        near = [p for p in layers(root) if re.match(rf"\d+[a-z]?_{name}\.ipynb", p.name)]
    else:
        near = [p for p in layers(root) if anchor[1:] in anchors(p)]
        near = [p for p in near if name in p.name] or near
    if len(near) == 1:
        return f"[{name}]({near[0].name}{anchor or ''})", ""
    there = f"it has {', '.join(sorted(anchors(target)))}" if target.exists() else "there is no such notebook"
    many = f"; several have it: {', '.join(p.name for p in near)}" if near else ""
    return "", f"{where}: the link {file}{anchor or ''} leads nowhere ({there}{many})"


def mended_test(root: Path, where: str, file: str, name: str) -> tuple[str, str]:
    "A test's id as it should be, and what is wrong with it."
    files = [path for path, names in tests(root).items() if name in names]
    if file in files:
        return f"`{file}::{name}`", ""
    if len(files) == 1:
        return f"`{files[0]}::{name}`", ""
    got = f"several files have it: {', '.join(files)}" if files else "no test file has such a test"
    return "", f"{where}: the guard {file}::{name} does not exist ({got})"


def mended(root: Path, where: str, text: str) -> tuple[str, list[str]]:
    "A markdown cell with its links to layers and its tests' ids mended, and complaints."
    wrong: list[str] = []

    def fix(kind):
        def replace(match: re.Match) -> str:
            new, complaint = kind(root, where, *match.groups())
            wrong.extend([complaint] if complaint else [])
            return new or match[0]

        return replace

    return NODE.sub(fix(mended_test), LINK.sub(fix(mended_link), text)), wrong


def incomplete(path: Path) -> list[str]:
    "Sections that lack a line, and sections and rows that name no guard."
    wrong = []
    for s in sections(path):
        wrong += [f"{s.where}: no line `- **{name}:** ...`" for name in FIELDS if not s.fields.get(name)]
        for name, pattern in (("Layer", LINK), ("Guard", NODE)):
            if s.fields.get(name) and not pattern.search(s.fields[name]):
                wrong.append(f"{s.where}: the line {name} names none, got {s.fields[name]!r}")
    for title, guard in rows(path):
        if not NODE.search(guard) and "`pyproject.toml`" not in guard:
            wrong.append(f"{path.name}, '{title}': names no test and no rule of the linter, got {guard!r}")
    return wrong


def rows(path: Path) -> list[tuple[str, str]]:
    "Title and guard of the defects in a notebook's tables."
    texts = [source(c) for c in cells(path) if c["cell_type"] == "markdown"]
    return [row for text in texts if "| guard |" in text for row in ROW.findall(text)]


def wanted(root: Path) -> tuple[dict[Path, str], list[str]]:
    "The notebooks as they should be, and complaints that no program can mend."
    texts, wrong, titles = {}, [], []
    for path in catalogue(root):
        nb = json.loads(path.read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            if cell["cell_type"] == "markdown":
                text, complaints = mended(root, path.name, source(cell))
                cell["source"] = text.splitlines(keepends=True)
                wrong += complaints
        wrong += incomplete(path)
        titles += [s.title for s in sections(path)] + [title for title, _ in rows(path)]
        texts[path] = json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    wrong += [f"two defects are called '{t}'" for t in sorted({t for t in titles if titles.count(t) > 1})]
    return texts, wrong if titles else ["no notebook nbs/[0-9]*_defects*.ipynb has a defect"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything is stale")
    args = parser.parse_args()
    texts, wrong = wanted(ROOT)
    for path, text in texts.items():
        if path.read_text(encoding="utf-8") != text:
            if args.check:
                wrong.append(f"{path.name}: links are stale; run `python scripts/defects.py`")
            else:
                path.write_text(text, encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    count = sum(len(sections(p)) + len(rows(p)) for p in texts)
    print(f"{count} defects in {len(texts)} notebooks, {len(wrong)} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
