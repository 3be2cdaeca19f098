"""The site: its explorer says what the package says, both builds list the same pages, the browser test finds faults."""

import asyncio
import html
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import check_site  # noqa: E402
import docs  # noqa: E402
import explorer  # noqa: E402
import reference  # noqa: E402

sys.path.pop(0)

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="no Node here; `make test-site` compares in a browser")
CHROMIUM = next(filter(None, map(shutil.which, check_site.NAMES)), None) or os.environ.get("CHROMIUM")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here; .ci/run installs it")


# ---- the explorer ----------------------------------------------------------------------------------------------------


@needs_node
def test_the_explorer_computes_what_the_package_computes():
    "Masks, receptive fields, FLOPs and bytes of drawn settings, and which settings are refused: equal, not close."
    asked = explorer.settings(40, seed=1)
    said = explorer.in_node(asked)
    assert 0 < sum(x["refused"] for x in said) < len(asked) / 2
    assert explorer.differences(asked, said) == []


@needs_node
@pytest.mark.parametrize(
    "right,wrong,name",
    [
        ("Math.floor(x / w) * inside(w)", "Math.floor(x / w) * inside(w - 1)", "mask"),
        ("const triangle = (c) => (c * (c + 1)) / 2", "const triangle = (c) => (c * (c - 1)) / 2", "flops"),
        ("(i % w) % r === s", "i % r === s", "reached"),
        ("Math.ceil(Math.min(o.lengths[g], o.n) / r)", "Math.floor(Math.min(o.lengths[g], o.n) / r)", "cache"),
        ("if (o.heads % o.kvHeads) return", "if (false) return", "refused"),
        ("(i && x < 999.5 ?", "(i ?", "shown"),
        ("% w === 0)", "% w === 1)", "confined"),
    ],
)
def test_a_wrong_explorer_is_found(right, wrong, name):
    text = explorer.SCRIPT.read_text(encoding="utf-8")
    assert text.count(right) == 1
    asked = explorer.settings(20, seed=1)[:20] + explorer.settings(0)[-2:]
    found = explorer.differences(asked, explorer.in_node(asked, text.replace(right, wrong)))
    assert any(line.startswith(name) for line in found)


@pytest.mark.parametrize(
    "value,said", [(1023, "1023 B"), (1024, "1.00 KiB"), (1020 * 1024, "1020 KiB"), (1024**2 - 1, "1.00 MiB")]
)
def test_sizes_have_no_exponent(value, said):
    "In Python; the explorer is held against it."
    assert explorer.shown(value, "B KiB MiB", 1024) == said


def test_segments_that_divide_the_longest_keep_what_is_in_it():
    "Then nothing passes its borders, however many layers there are; else it can. The explorer says which holds."
    import torch

    from dilated_attention_nb.masking import attention_counts

    def seen(lengths: tuple, rates: tuple, n: int) -> torch.Tensor:
        "Which token has heard of which after as many layers as there are tokens."
        known = attention_counts(n, n, 4, lengths, rates, is_causal=False, mixing="softmax").sum(0) > 0
        known |= torch.eye(n, dtype=torch.bool)
        for _ in range(n.bit_length()):
            known = known.float() @ known.float() > 0
        return known

    segment = torch.arange(48) // 12
    for lengths, rates in (((4, 12), (1, 3)), ((4, 6, 12), (1, 1, 1)), ((12, 3), (2, 1)), ((12,), (1,))):
        assert explorer.confined(lengths)
        assert not seen(lengths, rates, 48)[segment[:, None] != segment].any()
    assert not explorer.confined((10, 15)) and seen((10, 15), (1, 1), 30).all()


# ---- the pages -------------------------------------------------------------------------------------------------------


def pages() -> list:
    "All pages of the site, without making them."
    places = [s.relative_to(ROOT) for s in docs.find_sources()]
    places += [Path("reference/index.qmd"), *(Path("reference") / f"{m.stem}.qmd" for m in docs.modules())]
    return [docs.Page(place, place.stem) for place in places]


def test_quarto_and_the_preview_list_the_same_pages_in_the_same_order():
    there = pages()
    made = docs.quarto_settings(there, "_docs")
    assert sorted(made["nbdev.yml"]["project"]["render"]) == sorted(p.source.as_posix() for p in there)
    listed: list[str] = []
    for item in made["sidebar.yml"]["website"]["sidebar"]["contents"]:
        listed += item["contents"] if isinstance(item, dict) else [item]
    by_source = {p.source.as_posix(): p.target.as_posix() for p in there}
    shown = re.findall(r'<a href="([^"]+)"', docs.navigation(there, there[0]))
    assert [by_source[name] for name in listed] == shown
    assert sorted(listed) == sorted(by_source) and len(set(shown)) == len(shown)


def test_what_quarto_made_is_opened_in_a_browser_before_it_is_published():
    "No test here has Quarto: the workflow that publishes its site checks that very folder first."
    steps = docs.yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text())["jobs"]["site"]["steps"]
    done = [step.get("run") or step["uses"].partition("@")[0] for step in steps if "if" not in step]
    _, *after = done[done.index("make docs") :]
    assert [line.split(" --shots")[0] for line in after] == [
        ".venv/bin/python scripts/check_site.py --site _docs",
        "actions/upload-pages-artifact",
        "actions/deploy-pages",
    ]
    assert next(s for s in steps if "pages-artifact" in s.get("uses", ""))["with"]["path"] == "_docs"


def test_what_readers_were_promised_is_in_the_navigation():
    "The notebooks part by part, guides, reference, defects, benchmarks and lab log, each under its heading."
    found = {name: [p.source.as_posix() for p in group] for name, group in docs.sections(pages()).items()}
    for name, wanted in {
        "": ["index.ipynb"],
        "The idea": ["nbs/01_config.ipynb", "nbs/06_dilated.ipynb"],
        "Models": ["nbs/16_longnet.ipynb", "nbs/20_gigapath.ipynb"],
        "Training": ["nbs/23_distributed.ipynb"],
        "Guides": [
            "nbs/explanations/variants.ipynb",
            "nbs/explanations/explorer.qmd",
            "nbs/explanations/cluster.qmd",
            "nbs/examples/gigapath.ipynb",
            "nbs/examples/huggingface.ipynb",
            "nbs/explanations/migration.ipynb",
        ],
        "API reference": ["reference/index.qmd", "reference/masking.qmd"],
        "Evidence": ["nbs/26_benchmarks.ipynb", "nbs/27_defects.ipynb", "nbs/explanations/lab_log.qmd"],
        "Tools": ["nbs/30_plotting.ipynb", "nbs/35_main.ipynb"],
    }.items():
        assert set(wanted) <= set(found[name]), name
    assert sum(map(len, found.values())) == len(pages())


def test_a_page_is_made_again_when_what_it_imports_changed(tmp_path):
    "Modules that it imports, directly or not, and its own; for the root, all."
    package = tmp_path / "dilated_attention_nb"
    package.mkdir()
    for name, text in dict(a="", b="from dilated_attention_nb.a import x", c="", __init__="").items():
        (package / f"{name}.py").write_text(text)

    def names(text: str) -> list[str]:
        return [path.stem for path in docs.imported(text, package)]

    assert names("from dilated_attention_nb.b import y") == ["a", "b"]
    assert names("#| default_exp c\\n") == ["c"]
    assert names("import torch") == []
    assert names("from dilated_attention_nb import y") == ["__init__", "a", "b", "c"]


def test_links_of_names_lead_to_headings():
    "nbdev links every name of the index; private ones and methods have no heading on the page."
    text = "[`_run`](../nbs/a.html#_run), [`A.f`](../nbs/a.html#a.f), [`A`](../nbs/a.html#a), [text](../nbs/a.html#a.f)"
    wanted = "`_run`, [`A.f`](../nbs/a.html#a), [`A`](../nbs/a.html#a), [text](../nbs/a.html#a.f)"
    assert docs.plain_links(text) == wanted
    fenced = "```python\nf(x) # see [`A`](../nbs/a.html#a)\n```\n"
    assert docs.plain_links(fenced + text) == "```python\nf(x) # see `A`\n```\n" + wanted


def test_names_stand_once_on_a_page():
    body = '<a id="a"></a>\n<h2 id="a">A<a href="#a">x</a></h2><p><a id="b"></a></p><h2 id="a">A<a href="#a">x</a></h2>'
    wanted = '\n<h2 id="a">A<a href="#a">x</a></h2><p><a id="b"></a></p><h2 id="a-1">A<a href="#a-1">x</a></h2>'
    assert docs.distinct(body) == wanted


@pytest.mark.parametrize(
    "text", ["int | None", 'Float[Tensor, "b n h d"]', "tuple[int, ...]", "A.__call__", "x**2 * `$`"]
)
def test_code_of_the_reference_has_no_sign_that_markdown_reads(text):
    "pandoc makes quotes curly, `...` one sign and `__call__` bold within `<code>`; a bar ends a table's cell."
    made = reference.code(text)
    inner = made.removeprefix("<code>").removesuffix("</code>")
    assert re.fullmatch(r"(?:[A-Za-z0-9 ]|&#\d+;)+", inner) and html.unescape(inner) == text
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"| a | b |\n|---|---|\n| {made} | c |")])
    body, _ = docs.exporter().from_notebook_node(docs.tidy(notebook, {}))
    assert [html.unescape(x) for x in re.findall(r"<td><code>(.*?)</code></td>", body)] == [text]


def test_links_of_the_reference_lead_to_headings(tmp_path):
    "Letter by letter, as browsers compare them: pandoc keeps the capitals of a given name, the preview does not."
    folder = tmp_path / "reference"
    texts = {path.name: path.read_text(encoding="utf-8") for path in reference.write(docs.modules(), folder, "git")}
    places = {name: re.findall(r"^#+ .*\{#([^}]+)\}$", text, re.MULTILINE) for name, text in texts.items()}
    links = [m.groups() for m in re.finditer(r"\]\((\w+\.qmd)#([^)]+)\)", texts["index.qmd"])]
    assert len(links) > 300
    assert [link for link in links if link[1] not in places[link[0]]] == []
    assert [name for name, some in places.items() if len(set(some)) < len(some)] == []


# ---- the browser test ------------------------------------------------------------------------------------------------

FAULTS = {
    '<a href="gone.html">x</a>': "there is no nbs/gone.html",
    '<a href="#gone">x</a>': "nothing there is called #gone",
    '<a href="GIT/blob/main/gone.py">x</a>': "the repository has no gone.py",
    '<a href="GIT/blob/main/setup.py#L99999">x</a>': "setup.py is shorter",
    '<img src="gone.png" alt="x">': "image not drawn",
    '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">': "image without a description",
    "<script>console.error('so')</script>": "console: so",
    "<script>throw new Error('thus')</script>": "error in a script: thus",
    '<script src="https://example.org/x.js"></script>': "asks another host: https://example.org/x.js",
    "<div style='width: 600px'>wide</div>": "phone: scrolls sideways",
    "<p style='color: #888'>pale</p>": "light: contrast 3.54",
    "<p style='color: #555'>dim</p>": "dark: contrast",
    "<p style='font-size: 9px'>small</p>": "text of 9.0 pixels",
    "<h4>deep</h4>": "of level 4 below one of level 1",
    "<h1>second</h1>": "2 first headings",
    "<button></button>": "a control without a name",
    '<i id="site-menu"></i>': "two elements are called #site-menu",
    "<p>[<a href='#head'>a</a>](index.html)</p>": "a link that is shown as Markdown",
    "<svg></svg>": "a drawing without a description",
}


@needs_browser
@pytest.mark.slow
def test_the_browser_test_finds_faults_and_only_faults(tmp_path):
    "A small site: of each fault a page, one page that is right, and one that nothing leads to."
    git = docs.settings().git_url
    good = (
        '<table><tr><td style="min-width: 900px">wide in its box</td></tr></table><p><a href="#head">to the top</a></p>'
    )
    bodies = [good, *(fault.replace("GIT", git) for fault in FAULTS)]
    sources = [Path("index.ipynb"), *(Path(f"nbs/{i:02}_page{i}.ipynb") for i in range(1, len(bodies)))]
    there = [docs.Page(place, f"Title{i}") for i, place in enumerate(sources)]
    for page, body in zip(there, bodies):
        made = dict(key="", said="", body=f'<h1 id="head">{page.title}</h1>{body}')
        made["entries"] = [dict(head=page.title, text="", url=f"{page.target.as_posix()}#head")]
        path = docs.body_path(tmp_path / "proc" / page.source)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(docs.json.dumps(made))
    site = tmp_path / "site"
    docs.preview(there, tmp_path / "proc", site)
    (site / "lost.html").write_text((site / "index.html").read_text().replace(' aria-current="page"', "", 1))
    report = asyncio.run(check_site.run(site, 2, 0, None))
    for page, said in zip(there[1:], FAULTS.values()):
        assert any(said in line for line in report.wrong[page.target.as_posix()]), (said, report.wrong)
    assert len(report.wrong["index.html"]) == 1 and "misses lost.html" in report.wrong["index.html"][0]
    assert "phone: the menu does not show where one is" in report.wrong["lost.html"]


def test_without_a_browser_one_sentence_says_what_is_needed(monkeypatch):
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    with pytest.raises(SystemExit, match="no /nowhere/chromium here: install it .*apt-get install chromium"):
        check_site.find_chromium()
