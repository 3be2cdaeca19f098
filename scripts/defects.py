"""Keep the catalogue of defects (nbs/18*_defects*.ipynb) in step with the layers and tests that it names.

    python scripts/defects.py            mend links, write the table at the top of the first notebook
    python scripts/defects.py --check    write nothing; say what is stale or leads nowhere

A section is a markdown cell with a heading `### ...` and the lines `- **From:** ...`, `- **It did:** ...`,
`- **Layer:** [name](notebook#anchor)`, `- **Guard:** ...` (ids of tests, each in backticks). A test or an anchor
that moved to another file is found there and the line is mended; one that is nowhere, or in two places, is reported.
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
START, END = "<!-- table: scripts/defects.py -->", "<!-- end of the table -->"
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+\.ipynb)(#[^)\s]+)?\)")
NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


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
    return sorted((root / "nbs").glob("18*_defects*.ipynb"))


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
    found = [path for path, names in tests(root).items() if name in names]
    if file in found:
        return f"`{file}::{name}`", ""
    if len(found) == 1:
        return f"`{found[0]}::{name}`", ""
    got = f"several files have it: {', '.join(found)}" if found else "no test file has such a test"
    return "", f"{where}: the guard {file}::{name} does not exist ({got})"


def mend(root: Path, section: Section) -> tuple[dict[str, str], list[str]]:
    "The fields of a section with their links mended, and complaints."
    fields, wrong = dict(section.fields), [
        f"{section.where}: no line `- **{name}:** ...`" for name in FIELDS if not section.fields.get(name)
    ]  # fmt: skip

    def fix(kind):
        def replace(match: re.Match) -> str:
            new, bad = kind(root, section.where, *match.groups())
            wrong.extend([bad] if bad else [])
            return new or match[0]

        return replace

    fields["Layer"] = LINK.sub(fix(mended_link), fields.get("Layer", ""))
    fields["Guard"] = NODE.sub(fix(mended_test), fields.get("Guard", ""))
    for name, pattern in (("Layer", LINK), ("Guard", NODE)):
        if section.fields.get(name) and not pattern.search(fields[name]):
            wrong.append(f"{section.where}: the line {name} names none, got {section.fields[name]!r}")
    return fields, wrong


def table(root: Path, found: dict[Path, list[tuple[Section, dict[str, str]]]]) -> str:
    "One row for each defect, linked to its section."
    rows = ["| defect | from | it did | layer | guard |", "|---|---|---|---|---|"]
    for path, members in found.items():
        file = "" if path == catalogue(root)[0] else path.name
        for s, fields in members:
            cut = [fields.get(name, "").replace("|", "\\|") for name in FIELDS]
            cut[3] = NODE.sub(lambda m: f"`{m[2]}`", cut[3])
            rows.append(f"| [{s.title}]({file}#{slug(s.title)}) | " + " | ".join(cut) + " |")
    return "\n".join(rows)


def wanted(root: Path) -> tuple[dict[Path, str], list[str]]:
    "The notebooks as they should be, and complaints that no program can mend."
    found: dict[Path, list[tuple[Section, dict[str, str]]]] = {}
    texts, wrong = {}, []
    for path in catalogue(root):
        nb = json.loads(path.read_text(encoding="utf-8"))
        by_id = {c["id"]: c for c in nb["cells"]}
        for s in sections(path):
            fields, bad = mend(root, s)
            wrong += bad
            found.setdefault(path, []).append((s, fields))
            text = source(by_id[s.cell])
            for name in ("Layer", "Guard"):
                if s.fields.get(name):
                    text = text.replace(f"- **{name}:** {s.fields[name]}", f"- **{name}:** {fields[name]}")
            by_id[s.cell]["source"] = text.splitlines(keepends=True)
        texts[path] = nb
    titles = [s.title for members in found.values() for s, _ in members]
    wrong += [f"two sections are called '{t}'" for t in sorted({t for t in titles if titles.count(t) > 1})]
    if not found:
        return {}, ["no notebook nbs/18*_defects*.ipynb has a section"]
    first = catalogue(root)[0]
    holders = [c for c in texts[first]["cells"] if c["cell_type"] == "markdown" and START in source(c)]
    if len(holders) != 1:
        wrong.append(f"{first.name}: {len(holders)} cells hold the line {START}; one holds the table")
    for c in holders:
        before, rest = source(c).split(START)
        after = rest.split(END)[1] if END in rest else ""
        c["source"] = f"{before}{START}\n\n{table(root, found)}\n\n{END}{after}".splitlines(keepends=True)
    return {p: json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True) + "\n" for p, nb in texts.items()}, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything is stale")
    args = parser.parse_args()
    texts, wrong = wanted(ROOT)
    for path, text in texts.items():
        if path.read_text(encoding="utf-8") != text:
            if args.check:
                wrong.append(f"{path.name}: links or the table are stale; run `python scripts/defects.py`")
            else:
                path.write_text(text, encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{sum(len(sections(p)) for p in texts)} defects in {len(texts)} notebooks, {len(wrong)} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
