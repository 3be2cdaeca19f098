"""Build the site into _docs/: with Quarto if it is installed, else an HTML preview with nbconvert.

    python scripts/docs.py              build what changed
    python scripts/docs.py --preview    the preview, even where Quarto is installed
    python scripts/docs.py --jobs 1     use one process at a time

Both start from the same processed notebooks in _proc/, made with nbdev's processors, each in a process of its own:
hidden cells are gone, every exported cell shows its documentation and then its source, names in backticks are links.
Nothing is executed but imports and exported code; the outputs are those stored in the notebooks.

The processes are forked from one that has imported PyTorch and nbdev. A page is made again when its source, a module
that it imports, the index of names, the settings or this program changed: by their contents, not their dates.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import html
import importlib.metadata
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import reference
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROC = "_proc"
PARTS = {  # of the notebooks in order, by the number of the last one of each
    "The idea": 7, "Blocks": 10, "Many devices": 14, "Models": 21, "Training": 24, "Evidence": 29, "Tools": 99,
}  # fmt: skip
REPORTS = {"lab_log"}  # explanations that report rather than guide
FIRST = ["variants", "explorer", "cluster", "gigapath", "huggingface", "pytorch_encoder", "migration"]
RAW = re.compile(r"^```\{=html\}\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)  # HTML that is passed on as it is
FILES = ("*.js", "*.css")  # what pages load, beside them in nbs/
# What the process imports from which those of the pages are forked; nothing of this project, whose modules they run.
FIRST_IMPORTS = ["torch", "transformers", "nbdev.processors", "nbdev.showdoc", "matplotlib.pyplot", "einops"]
FIRST_IMPORTS += ["jaxtyping", "hypothesis", "IPython", "nbconvert", "latex2mathml.converter"]
MAKERS = ("nbdev", "nbconvert", "latex2mathml", "Pygments", "mistune")  # whose versions pages depend on
EXPORT = re.compile(r"^(\s*#\|\s*)exporti?[ \t]*$", re.MULTILINE)
HIDE = re.compile(r"^\s*#\|\s*hide\b", re.MULTILINE)
DEFINES = re.compile(r"^(def |class |async def |@|[A-Za-z_]\w*\s*[:=])", re.MULTILINE)
OPTION = re.compile(r"^#\|\s*([\w-]+):\s*(.*?)\s*$")
MARKDOWN_FILE = re.compile(r"\]\(([\w.-]+\.md)\)")  # a link from the index to a file that is no page
ANCHOR = re.compile(r'(<h\d id="|<a class="anchor-link" href="#)([^"]+)')
SOURCE_LINK = re.compile(r"^\[source\]\([^)]*\)\{[^}]*\}\s*$|^\[source\]\([^)]*\)\s*$", re.MULTILINE)
# A link that nbdev made of a name in backticks: private names have no heading, methods have that of their class.
NAME_LINK = re.compile(r"\[(`[^`\]]+`)\]\(([\w./]+\.html)#([\w.]+)\)")
FENCE = re.compile(r"^(`{3,}).*?^\1\s*?$", re.DOTALL | re.MULTILINE)
MATHS = re.compile(
    r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*?[^\s$\\])?)\$(?![\d$])", re.DOTALL
)
CODE = re.compile(r"(^(`{3,}|~{3,}).*?^\2`*\s*?$|(?P<t>`+)(?!`).+?(?<!`)(?P=t)(?!`))", re.DOTALL | re.MULTILINE)
QUARTO = """Quarto is not installed: writing a plain HTML preview instead.
For the real site (search, cross-references, themes) install it from the download page of the Quarto project, or with
`pip install quarto-cli`, `conda install -c conda-forge quarto` or `brew install --cask quarto`; then run this again."""

Job = tuple[Path, Path, Path, dict[str, str] | None]  # source, what is processed, place, links; None: no HTML


@dataclass
class Page:
    source: Path  # relative to the repository
    title: str

    @property
    def target(self) -> Path:
        "Where the page goes in the site: numbers are dropped, as nbdev does, so that links survive renumbering."
        return self.source.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", self.source.name.lower())).with_suffix(".html")


def settings() -> dict[str, str]:
    from nbdev.config import get_config

    return get_config()


# ---- processing -----------------------------------------------------------------------------------------------------


def split_title(cell) -> list:
    "Part `# Title` and `> line`, which become front matter, from prose in the same cell, which nbdev would drop."
    from execnb.nbio import mk_cell

    head = re.match(r"# .+\n*(?:> .+\n*)?", cell.source) if cell.cell_type == "markdown" else None
    rest = cell.source[head.end() :].strip() if head else ""
    return [mk_cell(head[0].strip(), "markdown"), mk_cell(rest, "markdown")] if rest else [cell]


def split_definitions(cell) -> list:
    "Part an exported cell after each public definition, so that a page shows its source below its documentation."
    import ast

    if cell.cell_type != "code" or not EXPORT.search(cell.source) or HIDE.search(cell.source):
        return [cell]
    lines, kinds = cell.source.splitlines(), ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    ends = [n.end_lineno for n in ast.parse(cell.source).body if isinstance(n, kinds) and n.name[0] != "_"][:-1]
    parts = [copy.deepcopy(cell) for _ in (*ends, None)]
    for i, (part, a, b) in enumerate(zip(parts, [0, *ends], [*ends, len(lines)])):
        directives = [line for line in lines[:a] if line.startswith("#|")]
        part.source = "\n".join([*directives, *lines[a:b]]).strip("\n")
        part.id = f"{cell.id}-{i}" if i else cell.id
    return parts


def plain_links(text: str) -> str:
    "Links of names lead to headings that there are."

    def replace(match: re.Match) -> str:
        name, page, anchor = match.groups()
        private = any(part.startswith("_") for part in anchor.split("."))
        return name if private else f"[{name}]({page}#{anchor.split('.')[0]})"

    text = FENCE.sub(lambda m: NAME_LINK.sub(r"\1", m[0]), text)  # a link in code is no link
    return NAME_LINK.sub(replace, text)


def process(source: Path, target: Path) -> None:
    "Run nbdev's processors over one notebook. Needs a process of its own: exported cells may register operators."
    import ast

    from execnb.nbio import read_nb, write_nb
    from nbdev.processors import FilterDefaults, exec_show_docs

    class RunExports(exec_show_docs):
        "Run exported cells, documentation and cells of nothing but imports; never a lesson that imports something."

        def __call__(self, cell):
            shown = re.search(r"^show_doc\(", cell.source or "", re.MULTILINE)
            if (
                cell.cell_type == "code"
                and not shown
                and not {"export", "exports", "exporti"} & cell.directives_.keys()
            ):
                tree = cell.parsed_()
                if not tree or not all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree):
                    return
            super().__call__(cell)

    class Filter(FilterDefaults):
        def base_procs(self):
            return [RunExports if p is exec_show_docs else p for p in super().base_procs()]

    sys.path.insert(0, str(ROOT))
    nb = read_nb(source)
    os.chdir(source.parent)
    nb.cells = [part for cell in nb.cells for piece in split_title(cell) for part in split_definitions(piece)]
    for cell in nb.cells:
        if cell.cell_type == "code" and DEFINES.search(cell.source) and not HIDE.search(cell.source):
            cell.source = EXPORT.sub(r"\1exports", cell.source)  # which shows the source as well
    Filter()(nb)
    cfg = settings()
    site = f"{cfg['doc_host']}{cfg['doc_baseurl']}/"
    up = "../" * len(source.relative_to(ROOT).parent.parts)
    files = f"]({cfg.git_url}/blob/{cfg.branch}/"
    for cell in nb.cells:
        cell.source = MARKDOWN_FILE.sub(files + r"\1)", plain_links((cell.source or "").replace(site, up)))
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            for kind in [k for k in data if k.startswith("text/")]:
                joined = data[kind] if isinstance(data[kind], str) else "".join(data[kind])
                data[kind] = SOURCE_LINK.sub("", plain_links(joined.replace(site, up))).splitlines(keepends=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, target)


@functools.cache
def tools() -> str:
    "What every page depends on: these programs, the settings, the index of names, the versions of what makes pages."
    cfg = settings()
    files = [Path(__file__), ROOT / "settings.ini", ROOT / cfg.lib_path.name / "_modidx.py"]
    return digest(*(path.read_bytes() for path in files), *(importlib.metadata.version(m).encode() for m in MAKERS))


def digest(*parts: bytes) -> str:
    "A hash of the parts, one after the other."
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "big") + part)
    return found.hexdigest()


def imported(text: str, package: Path) -> list[Path]:
    "The modules of `package` that a notebook or module with this text needs, those that they need included."
    pattern = re.compile(rf"\b(?:from|import) {package.name}(?:\.(\w+))?|default_exp (\w+)")
    every = {p.stem for p in package.glob("*.py")}
    found: set[str] = set()
    todo = [text]
    while todo:
        matches = [m[1] or m[2] for m in pattern.finditer(todo.pop())]
        new = (every if None in matches else every & set(matches)) - found  # None: the root, which has all names
        found |= new
        todo += [(package / f"{name}.py").read_text(encoding="utf-8") for name in new]
    return sorted(package / f"{name}.py" for name in found)


def key_of(source: Path) -> str:
    "Changes when what is made of a notebook or text may change."
    text = source.read_text(encoding="utf-8")
    if source.suffix != ".ipynb":
        return digest(tools().encode(), text.encode())
    modules = imported(text, ROOT / settings().lib_path.name)
    return digest(tools().encode(), text.encode(), *(path.read_bytes() for path in modules))


def stamp_of(target: Path) -> Path:
    "Where the key of what was processed is kept."
    return target.with_name(f".{target.name}.key")


def is_there(job: Job) -> bool:
    "Whether a page is there as it would be made."
    source, target, _, links = job
    key = key_of(source)
    processed = target.exists() and stamp_of(target).exists() and stamp_of(target).read_text() == key
    return processed and (links is None or is_rendered(target, links, key))


def make(job: Job) -> tuple[Path, str, bool]:
    "Make one page in this process: its place, what was said or what went wrong, and whether it was made."
    source, target, place, links = job
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".ipynb":
                process(source, target)
            elif source != target:
                shutil.copy2(source, target)
            key = key_of(source)
            stamp_of(target).write_text(key)
            if links is not None:
                render(target, place, links, key)
    except BaseException:  # whatever stops a notebook: the process that asked has to hear of it
        return place, said.getvalue() + traceback.format_exc(), False
    return place, said.getvalue(), True


def make_all(jobs: list[Job], processes: int) -> None:
    "Make the pages that are not there yet, each in a process of its own, the largest first."
    jobs = sorted((job for job in jobs if not is_there(job)), key=lambda job: -job[0].stat().st_size)
    if not jobs:
        return
    os.environ["IN_TEST"] = "1"  # for nbdev: nothing here is to be run as by a reader
    way = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(way)
    if way == "forkserver":
        context.set_forkserver_preload(FIRST_IMPORTS)
    with context.Pool(min(processes, len(jobs)), maxtasksperchild=1) as pool:
        for place, said, good in pool.imap_unordered(make, jobs, chunksize=1):
            if not good:
                raise SystemExit(f"{place}: could not be made\n{said}")


def copy_files(proc: Path) -> None:
    "What pages load or show, and no notebook that is gone."
    for extra in [path for kind in FILES for path in (ROOT / "nbs").rglob(kind)]:
        target = proc / extra.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(extra, target)
    for known in [*proc.rglob("*.ipynb"), *proc.rglob("*.qmd")]:
        if not (ROOT / known.relative_to(proc)).exists():
            known.unlink()
    for folder in ("images", "nbs/images"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, proc / folder, dirs_exist_ok=True)


def title_of(path: Path) -> str:
    "The title in a page's front matter, or its name."
    front = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        front = next(("".join(c["source"]) for c in json.loads(front)["cells"] if c["cell_type"] == "raw"), "")
    match = re.match(r"\s*---\n(.*?)\n---", front, re.DOTALL)
    return str((yaml.safe_load(match[1]) or {}).get("title", path.stem)) if match else path.stem


def find_sources() -> list[Path]:
    "The notebooks and texts that become pages; those of the API reference come on top."
    found = [ROOT / "index.ipynb", *sorted((ROOT / "nbs").rglob("*.ipynb")), *sorted((ROOT / "nbs").rglob("*.qmd"))]
    return [s for s in found if s.exists() and not any(p[0] in "._" for p in s.relative_to(ROOT).parts)]


def find_pages(proc: Path, render: bool = True, processes: int = 1) -> list[Page]:
    "Make what pages are made of, in `proc`; with `render` their HTML as well."
    cfg = settings()
    copy_files(proc)
    made = reference.write(modules(), proc / "reference", f"{cfg.git_url}/blob/{cfg.branch}")
    sources = {s.relative_to(ROOT): s for s in find_sources()} | {m.relative_to(proc): m for m in made}
    links = {place.name: Page(place, "").target.name for place in sources}
    if len(links) < len(sources):
        raise SystemExit(f"two pages have one name: {sorted(p.name for p in sources)}")
    make_all([(s, proc / place, place, links if render else None) for place, s in sources.items()], processes)
    return [Page(place, title_of(proc / place)) for place in sources]


def modules() -> list[Path]:
    "The package's modules in the order of their notebooks."
    notebooks = sorted((ROOT / "nbs").glob("[0-9]*_*.ipynb"))
    paths = [ROOT / settings().lib_path.name / (re.sub(r"^\d+[a-z]?_", "", n.stem) + ".py") for n in notebooks]
    return [path for path in paths if path.exists()]


def order(page: Page) -> tuple:
    "Numbered notebooks by number and letter (07, 07b, 08), others by name."
    number = re.match(r"(\d+)([a-z]?)_", page.source.name)
    return (int(number[1]), number[2], "") if number else (999, "", page.source.name)


def section(page: Page) -> str:
    "Where a page stands in the navigation."
    number = order(page)[0]
    if page.source.parts[0] == "reference":
        return "API reference"
    if page.source.parent == Path("nbs"):
        return next(part for part, last in PARTS.items() if number <= last)
    return "Evidence" if page.source.stem in REPORTS else "Guides" if page.source.parent != Path(".") else ""


def sections(pages: list[Page]) -> dict[str, list[Page]]:
    "The pages as the navigation lists them: home, the notebooks part by part, guides, reference."
    names = ["", *PARTS, "Guides", "API reference"]
    found = {name: [page for page in pages if section(page) == name] for name in names}
    for name in PARTS:
        found[name].sort(key=order)
    found["Guides"].sort(key=lambda p: (FIRST.index(p.source.stem) if p.source.stem in FIRST else len(FIRST), order(p)))
    return {name: group for name, group in found.items() if group}


# ---- Quarto ---------------------------------------------------------------------------------------------------------


def quarto_settings(pages: list[Page], out: str) -> dict[str, dict]:
    "What _quarto.yml reads: the pages and addresses, and the navigation."
    cfg = settings()
    contents: list = []
    for name, group in sections(pages).items():
        files = [p.source.as_posix() for p in group]
        contents += [{"section": name, "contents": files}] if name else files
    site = dict(title=cfg["title"], description=cfg["description"])
    site |= {"site-url": f"{cfg['doc_host']}{cfg['doc_baseurl']}"}
    project = {"project": {"output-dir": out, "render": [p.source.as_posix() for p in pages]}, "website": site}
    return {"nbdev.yml": project, "sidebar.yml": {"website": {"sidebar": {"contents": contents}}}}


def quarto(pages: list[Page], proc: Path, out: Path) -> None:
    "Render the processed pages with Quarto."
    for name, content in quarto_settings(pages, out.name).items():
        (proc / name).write_text(yaml.safe_dump(content, sort_keys=False))
    for path in (ROOT / "_quarto.yml", Path(__file__).with_name("quarto.css")):
        shutil.copy2(path, proc / path.name)
    done = subprocess.run(["quarto", "render", str(proc), "--no-execute"])
    if done.returncode:
        raise SystemExit(f"quarto failed with {done.returncode}")
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(proc / out.name, out)


# ---- preview --------------------------------------------------------------------------------------------------------


def mathml(text: str) -> str:
    "Replace `$..$` and `$$..$$` outside code by MathML, which browsers draw without a script."
    from latex2mathml.converter import convert

    def replace(match: re.Match) -> str:
        block = match["block"] is not None
        try:
            source = (match["block"] or match["inline"]).strip().replace("{aligned}", "{align*}")  # the name it knows
            drawn = convert(source, display="block" if block else "inline")
        except Exception as error:  # any of the converter's own errors: say which formula, show it as it is
            print(f"formula not understood, shown as TeX: {match[0]!r} ({error!r})", file=sys.stderr)
            return match[0]
        return drawn.replace("|", "&#124;").replace("\n", " ")

    pieces, at = [], 0
    for code in CODE.finditer(text):
        pieces += [MATHS.sub(replace, text[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*pieces, MATHS.sub(replace, text[at:])])


def plain_markdown(text: str, links: dict[str, str]) -> str:
    "Markdown without Quarto's own marks: divs, attributes, executable fences, links to sources."
    text = RAW.sub(lambda m: "\n" + re.sub(r"\n\s*\n", "\n", m[1]).strip() + "\n", text)
    text = re.sub(r"^:{3,}\s*\{([^}]*)\}\s*$", _div, text, flags=re.MULTILINE)
    text = re.sub(r"^:{3,}\s*$", "\n</div>\n", text, flags=re.MULTILINE)
    text = re.sub(r"^```\{(\w+)[^}]*\}", r"```\1", text, flags=re.MULTILINE)
    text = re.sub(r"^(#+ .*?)\s*\{#([^} ]+)[^}]*\}\s*$", r'<a id="\2"></a>\n\n\1', text, flags=re.MULTILINE)
    text = re.sub(r"^(#+ .*?)\s*\{[^}]*\}\s*$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"\]\(([^)#\s]+\.(?:ipynb|qmd))(#[^)]*)?\)", lambda m: _link(m, links), text)
    return mathml(text)


def _div(match: re.Match) -> str:
    names = [part[1:] for part in match[1].split() if part.startswith(".")]
    callout = any(name.startswith("callout") for name in names)
    return f'\n<div class="{html.escape(" ".join([*names, *(["callout"] if callout else [])]))}">\n'


def _link(match: re.Match, links: dict[str, str]) -> str:
    "Point a link to a notebook or page at what is made of it."
    name = Path(match[1]).name
    if name not in links:
        print(f"link to {match[1]}, which is no page here", file=sys.stderr)
    folder = match[1][: -len(name)]
    return f"]({folder}{links.get(name, name)}{match[2] or ''})"


def as_notebook(path: Path):
    "A processed page as a notebook; a .qmd becomes one markdown cell."
    import nbformat

    if path.suffix == ".ipynb":
        return nbformat.read(path, as_version=4)
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(path.read_text(encoding="utf-8"))])


def tidy(nb, links: dict[str, str]):
    "Apply the `#|` options that remain after processing, and turn front matter into a heading."
    import nbformat

    cells = []
    for cell in nb.cells:
        if cell.cell_type != "code":
            front = re.match(r"\s*---\n(.*?)\n---\s*", cell.source, re.DOTALL) if not cells else None
            if front:
                meta = yaml.safe_load(front[1]) or {}
                head = f"# {meta.get('title', '')}\n"
                if meta.get("description"):
                    lead = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(str(meta["description"])))
                    head += f'\n<p class="lead">{lead}</p>\n'
                cells.append(nbformat.v4.new_markdown_cell(head))
            rest = cell.source[front.end() :] if front else cell.source
            if rest.strip() and cell.cell_type == "markdown":
                cells.append(nbformat.v4.new_markdown_cell(plain_markdown(rest, links)))
            continue
        lines = cell.source.splitlines()
        options = {m[1]: m[2] for line in lines if (m := OPTION.match(line))}
        if options.get("include") == "false":
            continue
        cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
        cell.metadata["tags"] = ["no-input"] if options.get("echo") == "false" or not cell.source else []
        if options.get("output") == "false":
            cell.outputs = []
        alt = options.get("fig-alt", options.get("fig-cap", "")).strip("\"'")
        for out in cell.outputs:
            if "image/png" in out.get("data", {}) and alt:
                out.metadata["image/png"] = {"alt": alt}
            if "text/markdown" in out.get("data", {}):
                out.data["text/markdown"] = plain_markdown(out.data["text/markdown"], links)
        if cell.outputs or "no-input" not in cell.metadata["tags"]:
            cells.append(cell)
    nb.cells = cells
    return nb


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{up}preview.css">
<script src="{up}preview.js" data-up="{up}"></script>
</head>
<body>
<header>
<button id="site-menu" aria-expanded="false" aria-controls="site-pages">Pages</button>
<a class="home" href="{up}index.html">dilated-attention-nb</a>
<div role="search">
<input id="site-search" type="search" placeholder="Search" aria-label="Search the site" autocomplete="off">
<ul id="site-results" hidden></ul></div>
<button id="site-theme" aria-label="Light or dark">◐</button>
</header>
<nav id="site-pages" aria-label="Pages">
{nav}
</nav>
<main>
{body}
{along}
</main>
</body>
</html>
"""


def navigation(pages: list[Page], here: Page) -> str:
    up = "../" * len(here.target.parent.parts)
    lines = []
    for name, group in sections(pages).items():
        shown = " open" if here in group or section(here) == "" else ""
        lines += [f"<details{shown}><summary>{html.escape(name)}</summary>"] if name else []
        for page in group:
            mark = ' aria-current="page"' if page == here else ""
            lines.append(f'<a href="{up}{page.target.as_posix()}"{mark}>{html.escape(page.title)}</a>')
        lines += ["</details>"] if name else []
    return "\n".join(lines)


def contents(body: str) -> str:
    "The page, with a list of its sections below the title if there are many."
    heads = re.findall(r'<h2 id="([^"]*)"[^>]*>(.*?)(?:<a class="anchor-link".*?)?</h2>', body, re.DOTALL)
    if len(heads) < 4:
        return body
    items = "".join(f'<li><a href="#{anchor}">{re.sub("</?a[^>]*>", "", text)}</a></li>' for anchor, text in heads)
    listed = f'<details class="contents"><summary>On this page</summary><ul>{items}</ul></details>'
    lead = re.search(r'<p class="lead">.*?</p>|</h1>', body, re.DOTALL)
    return body[: lead.end()] + listed + body[lead.end() :] if lead else body


def along(pages: list[Page], here: Page) -> str:
    "Links to the page before and the page after."
    line = [page for group in sections(pages).values() for page in group]
    at, up = line.index(here), "../" * len(here.target.parent.parts)
    found = [(line[at - 1], "prev", "← ", "")] if at else []
    found += [(line[at + 1], "next", "", " →")] if at + 1 < len(line) else []
    links = "".join(
        f'<a rel="{rel}" href="{up}{p.target.as_posix()}">{before}{html.escape(p.title)}{after}</a>'
        for p, rel, before, after in found
    )
    return f'<footer class="along">{links}</footer>'


def search_entries(place: Path, body: str) -> list[dict[str, str]]:
    "A page for the search: one entry for each heading, with the words below it."
    pieces = re.split(
        r'<h[1-4] id="([^"]*)"[^>]*>(.*?)</h[1-4]>', re.sub(r"<(script|style|math)\b.*?</\1>", " ", body, flags=re.S)
    )
    entries = []
    for anchor, head, text in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
        plain = [re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", x))).strip(" ¶") for x in (head, text)]
        entries.append({"head": plain[0], "text": plain[1][:1500], "url": f"{place.as_posix()}#{anchor}"})
    return entries


def distinct(body: str) -> str:
    "Every name once: no anchor beside a heading of that name, and a repeated heading gets a number, as Quarto's do."
    heads = set(re.findall(r'<h\d id="([^"]+)"', body))
    body = re.sub(
        r'(?:<p>)?<a id="([^"]+)"></a>(?:</p>)?', lambda m: "" if html.unescape(m[1]) in heads else m[0], body
    )
    seen: dict[str, int] = {}

    def number(match: re.Match) -> str:
        seen[match[2]] = seen.get(match[2], -1) + 1
        name = f"{match[2]}-{seen[match[2]]}" if seen[match[2]] else match[2]
        return f'<h{match[1]} id="{name}"{match[3].replace(f"#{match[2]}", f"#{name}")}</h{match[1]}>'

    return re.sub(r'<h(\d) id="([^"]+)"(.*?)</h\1>', number, body, flags=re.DOTALL)


@functools.cache
def exporter():
    "nbconvert's HTML exporter for texts of our own: it washes nothing, and adds no text where one is missing."
    from nbconvert.exporters.html import HTMLExporter
    from nbconvert.filters import Highlight2HTML
    from nbconvert.filters.widgetsdatatypefilter import WidgetsDataTypeFilter
    from traitlets.config import Config

    class Plain(HTMLExporter):
        def from_notebook_node(self, nb, resources=None, **more):
            resources = self._init_resources(resources)
            kinds = WidgetsDataTypeFilter(notebook_metadata=self._nb_metadata, parent=self, resources=resources)
            self.register_filter("highlight_code", Highlight2HTML(pygments_lexer="ipython3", parent=self))
            self.register_filter("filter_data_type", kinds)
            self.register_filter("clean_html", lambda text: text.decode() if isinstance(text, bytes) else text)
            return super(HTMLExporter, self).from_notebook_node(nb, resources, **more)  # its own parses all again

    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {"no-input"}
    config.HTMLExporter.exclude_input_prompt = True
    config.HTMLExporter.exclude_output_prompt = True
    config.HTMLExporter.preprocessors = ["nbconvert.preprocessors.TagRemovePreprocessor"]
    return Plain(config=config, template_name="basic")


def body_key(links: dict[str, str], key: str) -> str:
    return digest(key.encode(), json.dumps(links, sort_keys=True).encode())


def is_rendered(path: Path, links: dict[str, str], key: str) -> bool:
    target = body_path(path)
    return target.exists() and json.loads(target.read_text(encoding="utf-8"))["key"] == body_key(links, key)


def render(path: Path, place: Path, links: dict[str, str], key: str) -> None:
    "Render the processed page at `path` with nbconvert."
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        body, _ = exporter().from_notebook_node(tidy(as_notebook(path), links))
    body = ANCHOR.sub(lambda m: m[1] + m[2].lower().replace(":", ""), body)  # as Quarto writes them
    body = distinct(body)
    entries = search_entries(Page(place, "").target, body)
    made = dict(key=body_key(links, key), said=said.getvalue(), body=body, entries=entries)
    body_path(path).write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")


def body_path(path: Path) -> Path:
    "Where the HTML of a processed page is kept."
    return path.with_name(f".{path.name}.json")


def preview(pages: list[Page], proc: Path, out: Path) -> None:
    "Put the rendered pages into a site: around each the navigation, beside them what they load."
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    index: list[dict[str, str]] = []
    for page in pages:
        made = json.loads(body_path(proc / page.source).read_text(encoding="utf-8"))
        if made["said"]:
            print(f"{page.source}: {made['said'].strip()}", file=sys.stderr)
        target = part / page.target
        target.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * len(page.target.parent.parts)
        parts = dict(nav=navigation(pages, page), body=contents(made["body"]), along=along(pages, page))
        target.write_text(PAGE.format(title=html.escape(page.title), up=up, **parts), encoding="utf-8")
        index += [dict(page=page.title, **entry) for entry in made["entries"]]
    (part / "search-index.js").write_text("window.SEARCH = " + json.dumps(index, ensure_ascii=False), encoding="utf-8")
    for name in ("preview.css", "preview.js"):
        shutil.copy2(Path(__file__).with_name(name), part / name)
    for extra in [path for kind in FILES for path in (proc / "nbs").rglob(kind)]:
        (part / extra.relative_to(proc)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(extra, part / extra.relative_to(proc))
    for folder in ("images", "nbs/images"):
        if (proc / folder).is_dir():
            shutil.copytree(proc / folder, part / folder)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preview", action="store_true", help="use nbconvert even where Quarto is installed")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes at a time; %(default)s here")
    args = parser.parse_args()
    os.chdir(ROOT)
    proc, out = ROOT / PROC, ROOT / settings().doc_path.name
    proc.mkdir(exist_ok=True)
    with_quarto = shutil.which("quarto") is not None and not args.preview
    pages = find_pages(proc, not with_quarto, args.jobs)
    if with_quarto:
        quarto(pages, proc, out)
    else:
        if not args.preview:
            print(QUARTO)
        preview(pages, proc, out)
    print(f"{len(pages)} pages in {out.name}/: open {out.name}/index.html")
    return 0


def cores() -> int:
    "Cores that this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
