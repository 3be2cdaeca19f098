"""The programs in scripts/: each finds the fault that it is there for."""

import base64
import importlib.util
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = itertools.count()


def load(name: str):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


def code(*lines: str, **more) -> dict:
    source = "\n".join(lines).splitlines(keepends=True)
    return (
        dict(cell_type="code", id=f"code{next(NUMBERS)}", metadata={}, execution_count=None, outputs=[], source=source)
        | more
    )


def prose(text: str) -> dict:
    return dict(cell_type="markdown", id=f"prose{next(NUMBERS)}", metadata={}, source=text.splitlines(keepends=True))


def write(path: Path, *cells: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps(dict(cells=list(cells), metadata=kernel, nbformat=4, nbformat_minor=5), indent=1))
    return path


def layer(root: Path, number: int, name: str, *exported: str) -> Path:
    "A small, correct notebook that exports `exported`."
    cells = [code("#| export", text) for text in exported]
    return write(root / f"nbs/{number:02}_{name}.ipynb", code(f"#| default_exp {name}"), prose(f"# {name}"), *cells)


# ---- check_imports ---------------------------------------------------------------------------------------------------


def test_a_good_order_passes(tmp_path):
    layer(tmp_path, 0, "config", "X = 1")
    layer(tmp_path, 4, "masking", "from dilated_attention_nb.config import X", "Y = X")
    layer(tmp_path, 5, "partial", "from dilated_attention_nb.masking import Y", "Z = Y")
    assert load("check_imports").check(tmp_path) == []


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("from dilated_attention_nb.partial import Z", "not lower"),
        ("from dilated_attention_nb.masking import Y", "not lower"),
        ("from dilated_attention_nb.config import *", "import the names"),
        ("from dilated_attention_nb import X", "package root"),
        ("import dilated_attention_nb.config", "import the names"),
        ("from .config import X", "relative import"),
        ("from dilated_attention_nb.nothing import X", "no numbered notebook"),
        ("from dilated_attention_nb.testing import X", "for lessons and tests"),
        ("def f():\n    from dilated_attention_nb.partial import Z", "not lower"),
        ("from dilated_attention_nb.config import X\n\nY = X", "cell of their own"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, line, complaint):
    layer(tmp_path, 0, "config", "X = 1")
    layer(tmp_path, 1, "testing", "X2 = 1")
    layer(tmp_path, 5, "partial", "Z = 1")
    layer(tmp_path, 4, "masking", line)
    [found] = load("check_imports").check(tmp_path)
    assert "04_masking" in found and complaint in found


def test_the_module_that_python_runs(tmp_path):
    "`__main__` comes from a notebook called main; of the package root it may have the version, and nothing else."
    cells = code("#| default_exp __main__"), prose("# main")
    version, more = (
        code("#| export", f"from dilated_attention_nb import {x}") for x in ("__version__", "__version__, f")
    )
    write(tmp_path / "nbs/19_main.ipynb", *cells, version)
    assert load("check_imports").check(tmp_path) == []
    write(tmp_path / "nbs/19_main.ipynb", *cells, more)
    (found,) = load("check_imports").check(tmp_path)
    assert "package root" in found
    (tmp_path / "nbs/19_main.ipynb").rename(tmp_path / "nbs/19_start.ipynb")
    assert any("call it NN_" in line for line in load("check_imports").check(tmp_path))


def test_lessons_may_import_what_exported_code_may_not(tmp_path):
    layer(tmp_path, 1, "testing", "X = 1")
    lesson = code("from dilated_attention_nb.testing import X")
    write(tmp_path / "nbs/04_masking.ipynb", code("#| default_exp masking"), prose("# Masks"), lesson)
    assert load("check_imports").check(tmp_path) == []


@pytest.mark.parametrize(
    "cells, complaint",
    [
        ([code("#| default_exp config"), prose("# Config")], "taken by"),
        ([code("#| default_exp other"), prose("# Other")], "call it NN_other"),
        ([code("#| export", "x = 1"), prose("# None")], "no `#| default_exp`"),
        ([prose("# Title"), prose("# Another")], "2 markdown cells"),
        ([prose("No title")], "0 markdown cells"),
        ([prose("# A"), code("x = 1", id="same"), code("y = 1", id="same")], "same"),
        ([prose("# A"), code("x") | {"source": "x = 1\ny = 2"}], "not a list of lines"),
        ([prose("# A"), code(f"x = {'1' * 500_000!r}")], "KB stored"),
    ],
)
def test_a_notebook_that_would_be_lost_is_found(tmp_path, cells, complaint):
    layer(tmp_path, 0, "config", "X = 1")
    write(tmp_path / "nbs/03_pool.ipynb", *cells)
    assert any(complaint in line and "03_pool" in line for line in load("check_imports").check(tmp_path))


# ---- check_export ----------------------------------------------------------------------------------------------------


def project(tmp_path: Path) -> Path:
    "A project of one notebook, exported."
    root = tmp_path / "project"
    layer(root, 0, "config", "X = 1")
    (root / "scripts").mkdir()
    for name in ("root.py", "readme.py"):
        (root / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (root / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    load("check_export").generate(root)
    return root


def test_export_finds_what_is_edited_stale_missing_or_unclean(tmp_path):
    check = load("check_export").check
    root = project(tmp_path)
    module = root / "dilated_attention_nb/config.py"
    text = module.read_text()
    assert check(root) == []

    module.write_text(text.replace("X = 1", "X = 2"))
    [found] = check(root)
    assert "config.py: differs" in found and "+X = 1" in found
    assert "X = 2" in module.read_text(), "the user's file was touched"

    module.unlink()
    assert any("config.py: missing" in line for line in check(root))

    module.write_text(text)
    (root / "dilated_attention_nb/old.py").write_text(text)
    assert any("old.py: stale" in line for line in check(root))
    (root / "dilated_attention_nb/old.py").unlink()

    notebook = root / "nbs/00_config.ipynb"
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    assert any("00_config.ipynb: differs" in line for line in check(root))


def test_two_modules_may_not_export_one_name(tmp_path):
    (tmp_path / "a.py").write_text("__all__ = ['f']\n")
    (tmp_path / "b.py").write_text("__all__ = ['f']\n")
    with pytest.raises(SystemExit, match="a and b both export 'f'"):
        load("root").collect(tmp_path)


# ---- check_wheel -----------------------------------------------------------------------------------------------------

DECLARED = [
    "einops>=0.8",
    "jaxtyping>=0.2",
    "hypothesis>=6; extra == 'dev'",
    'no-such-package>=1; extra == "more"',
    "triton>=3.5; sys_platform == 'nowhere' and extra == 'more'",
]


@pytest.mark.parametrize(
    ("extra", "there", "missing"),
    [
        ("", {"einops", "jaxtyping"}, []),
        ("dev", {"einops", "jaxtyping", "hypothesis"}, []),
        ("more", {"einops", "jaxtyping"}, ["no-such-package"]),
    ],
)
def test_what_an_environment_gets_is_what_is_declared(extra, there, missing):
    found, absent = load("check_wheel").requirements(DECLARED, extra)
    assert there <= set(found) and absent == missing
    assert "wadler-lindig" in found, "what jaxtyping itself requires"
    assert not {"pytest", "nbdev", "torch"} & set(found)


def test_a_stand_in_is_a_wheel_that_pip_takes(tmp_path):
    load("check_wheel").stand_in("flash-attn", "2.8.3", tmp_path)
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--dry-run", "--find-links", str(tmp_path)]
    done = subprocess.run([*command, "flash-attn>=2.7"], capture_output=True, text=True)
    assert done.returncode == 0 and "Would install flash-attn-2.8.3" in done.stdout.replace("flash_attn", "flash-attn")
    assert subprocess.run([*command, "flash-attn>=2.9"], capture_output=True, text=True).returncode


def test_a_program_that_ends_otherwise_is_a_failure(tmp_path):
    run = load("check_wheel").run
    assert run([sys.executable, "-c", "print(1); exit(3)"], tmp_path, "it", 3) == "1\n"
    with pytest.raises(SystemExit, match="(?s)it failed, status 3:.*1"):
        run([sys.executable, "-c", "print(1); exit(3)"], tmp_path, "it")


# ---- notebooks -------------------------------------------------------------------------------------------------------


def png(**metadata: str) -> str:
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(1, 1))
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata=metadata)
    plt.close(figure)
    return base64.b64encode(out.getvalue()).decode()


def test_pictures_depend_on_their_pixels_alone():
    import matplotlib.image
    import numpy as np

    plain_png = load("notebooks").plain_png
    one, two = png(Comment="one"), png(Comment="two", Software="something else")
    assert one != two and plain_png(one) == plain_png(two) == plain_png(plain_png(one))
    pixels = [matplotlib.image.imread(io.BytesIO(base64.b64decode(data))) for data in (one, plain_png(one))]
    assert np.array_equal(*pixels)


@pytest.mark.parametrize(
    "out, complaint",
    [
        (dict(output_type="stream", name="stdout", text=["fine\n"]), None),
        (dict(output_type="stream", name="stdout", text=["at 0x7f00deadbeef\n"]), "address"),
        (dict(output_type="stream", name="stderr", text=["UserWarning: x\n"]), "stderr"),
        (dict(output_type="stream", name="stdout", text=[f"{ROOT}/x.py\n"]), "different on every machine"),
        (dict(output_type="error", ename="ValueError", evalue="", traceback=[]), "stored error"),
        (
            dict(output_type="display_data", metadata={}, data={"application/vnd.jupyter.widget-view+json": {}}),
            "widget",
        ),
    ],
)
def test_outputs_that_would_not_stay_are_refused(out, complaint):
    found = load("notebooks").complaints(code("x", outputs=[out]))
    assert not found if complaint is None else any(complaint in line for line in found)


def test_pieces_of_a_stream_are_joined():
    pieces = [dict(output_type="stream", name="stdout", text=t) for t in ("one\n", "tw", "o\n")]
    assert load("notebooks").settle(pieces) == [dict(output_type="stream", name="stdout", text=["one\n", "two\n"])]


def test_executing_twice_stores_the_same_bytes(tmp_path):
    notebooks = load("notebooks")
    lines = [
        "import matplotlib.pyplot as plt",
        "plt.figure(figsize=(1, 1)).gca().plot([1, 2])",
        "print({'a', 'b'}, object())",
    ]
    path = write(tmp_path / "x.ipynb", prose("# X"), code(*lines), code("#| eval: false", "1 / 0"))
    first, found = notebooks.execute(path, 120)
    path.write_text(first)
    assert not found and notebooks.execute(path, 120)[0] == first and "image/png" in first


# ---- run_notebooks_tests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cells, good, line",
    [
        ([code("assert 1 + 1 == 2")], True, "1 of 1 code cells"),
        ([code("#| notest", "1 / 0"), code("x = 1")], True, "1 of 2 code cells"),
        ([code("assert 1 + 1 == 3")], False, "AssertionError"),
        ([code("import time", "time.sleep(60)")], False, "still running after 8 s"),
        ([code("import os", "os._exit(3)")], False, "ended with 3"),
        ([code("#| eval: false", "1 / 0")], False, "no cell ran"),
    ],
)
def test_notebooks_are_run_counted_and_ended(tmp_path, cells, good, line):
    path = write(tmp_path / "x.ipynb", prose("# X"), *cells)
    passed, said = load("run_notebooks_tests").run(path, 8, 1)
    assert passed is good and line in said


# ---- readme ----------------------------------------------------------------------------------------------------------


def test_the_readme_shows_what_the_index_shows():
    picture = dict(output_type="display_data", metadata={}, data={"image/png": base64.b64encode(b"bytes").decode()})
    printed = dict(output_type="stream", name="stdout", text=["three ```\n"])
    cells = [
        prose("# Title"),
        code("#| hide", "secret"),
        code("#| echo: false", "#| label: fig-pattern", '#| fig-alt: "a grid"', "draw()", outputs=[picture]),
        code("x = 1", "print(x)", outputs=[printed]),
    ]
    text, images = load("readme").render(dict(cells=cells))
    assert images == {"images/readme-pattern.png": b"bytes"}
    assert "![a grid](images/readme-pattern.png)" in text and "secret" not in text and "draw" not in text
    assert "```python\nx = 1\nprint(x)\n```" in text and "````\nthree ```\n````" in text


def test_readme_links_lead_somewhere():
    import re

    for target in re.findall(r"\]\(([^)#\s]+)\)", (ROOT / "README.md").read_text()):
        assert "://" in target or (ROOT / target).exists(), target


# ---- docs ------------------------------------------------------------------------------------------------------------


def test_formulas_become_mathml_outside_code_only():
    mathml = load("docs").mathml
    assert mathml("costs $5 and $6, `$x$`") == "costs $5 and $6, `$x$`"
    assert mathml("```\n$x$\n```") == "```\n$x$\n```"
    assert mathml("so $x_i$ is").startswith("so <math") and 'display="block"' in mathml("$$x$$")


def test_marks_of_quarto_do_not_reach_the_preview():
    plain = load("docs").plain_markdown
    text = plain(
        "::: {.callout-note}\nsee [it](00_config.ipynb#x)\n:::\n\n## Head {#sec-a}", {"00_config.ipynb": "config.html"}
    )
    assert ":::" not in text and "[it](config.html#x)" in text and "## Head\n" in text + "\n"
    assert "{#" not in text and '<a id="sec-a"></a>' in text


def test_prose_beside_the_title_stays_on_the_page():
    from execnb.nbio import mk_cell

    split = load("docs").split_title
    whole = mk_cell("# Title\n\n> line\n\nThree sentences.\n\n- key: value", "markdown")
    assert [c.source for c in split(whole)] == ["# Title\n\n> line", "Three sentences.\n\n- key: value"]
    for text in ("# Title", "# Title\n\n> line", "Prose", "## Section\n\nProse"):
        assert [c.source for c in split(mk_cell(text, "markdown"))] == [text]
