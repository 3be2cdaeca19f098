"""The programs in scripts/: each finds the fault that it is there for."""

import base64
import importlib.util
import io
import itertools
import json
import os
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


PICTURE = dict(output_type="display_data", metadata={}, data={"image/png": ""})


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


def test_tools_stand_last_and_are_imported_where_they_are_used(tmp_path):
    layer(tmp_path, 1, "config", "X = 1")
    layer(tmp_path, 30, "plotting", "Y = 1")
    layer(tmp_path, 36, "files", "Z = 1")
    layer(tmp_path, 26, "benchmarks", "def f():\n    from dilated_attention_nb.plotting import Y")
    layer(tmp_path, 23, "distributed", "from dilated_attention_nb.files import Z")
    assert load("check_imports").check(tmp_path) == []
    layer(tmp_path, 26, "benchmarks", "from dilated_attention_nb.plotting import Y")
    (complaint,) = load("check_imports").check(tmp_path)
    assert "26_benchmarks" in complaint and "not lower" in complaint


def test_the_module_that_python_runs(tmp_path):
    "`__main__` comes from a notebook called main; of the package root it may have the version, and nothing else."
    cells = code("#| default_exp __main__"), prose("# main")
    version, more = (
        code("#| export", f"from dilated_attention_nb import {x}") for x in ("__version__", "__version__, f")
    )
    write(tmp_path / "nbs/35_main.ipynb", *cells, version)
    assert load("check_imports").check(tmp_path) == []
    write(tmp_path / "nbs/35_main.ipynb", *cells, more)
    (found,) = load("check_imports").check(tmp_path)
    assert "package root" in found
    (tmp_path / "nbs/35_main.ipynb").rename(tmp_path / "nbs/19_start.ipynb")
    assert any("call it NN_" in line for line in load("check_imports").check(tmp_path))


def test_a_figure_with_words_passes(tmp_path):
    seen = code("#| hide_line", '#| fig-alt: "time over length, a line that rises"', "draw()", outputs=[PICTURE])
    write(tmp_path / "nbs/examples/one.ipynb", prose("# One"), seen)
    assert load("check_imports").check(tmp_path) == []


def test_lessons_may_import_what_exported_code_may_not(tmp_path):
    layer(tmp_path, 1, "testing", "X = 1")
    lesson = code("from dilated_attention_nb.testing import X")
    write(tmp_path / "nbs/02_masking.ipynb", code("#| default_exp masking"), prose("# Masks"), lesson)
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
        ([prose("# A"), code("draw()", id="drawn", outputs=[PICTURE])], "cell 2 (drawn): a figure without words"),
        ([prose("# A"), code('#| fig-alt: "a plot"', "draw()", outputs=[PICTURE])], "a figure without words"),
        ([prose("# A"), code('#| fig-alt: "time over length, a rising line"', "draw()")], "a figure that isn't stored"),
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
    layer(root, 1, "config", "X = 1")
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

    notebook = root / "nbs/01_config.ipynb"
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    assert any("01_config.ipynb: differs" in line for line in check(root))


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
        "print({'a', 'b'}, object(), 1 / 3)",
    ]
    path = write(tmp_path / "x.ipynb", prose("# X"), code(*lines), code("#| eval: false", "1 / 0"))
    first, complaints, differ = notebooks.execute(path, 120)
    assert not complaints and "image/png" in first and "stored nothing, now printed text, figure" in differ[0]
    assert first.count("0.3333333333333333") == 1
    other = first.replace(
        "0.3333333333333333", "0.3333333333333331"
    )  # another machine's rounding: as good, so it stays
    path.write_text(other)
    assert notebooks.execute(path, 120) == (other, [], [])


# ---- outputs ---------------------------------------------------------------------------------------------------------


def printed(text: str) -> dict:
    return dict(output_type="stream", name="stdout", text=text.splitlines(keepends=True))


def value(text: str) -> dict:
    return dict(output_type="execute_result", metadata={}, execution_count=None, data={"text/plain": [text]})


def figure(x: float, width: float = 2.0) -> dict:
    "A line that ends at `x`, from 0 to 1; 200 pixels are the axis."
    import matplotlib.pyplot as plt

    drawn = plt.figure(figsize=(width, 1), dpi=100)
    ax = drawn.add_axes((0, 0, 1, 1))
    ax.plot((0, x), (0, 0.7))
    ax.set(xlim=(0, 1), ylim=(0, 1))
    out = io.BytesIO()
    drawn.savefig(out, format="png")
    plt.close(drawn)
    return dict(output_type="display_data", metadata={}, data={"image/png": base64.b64encode(out.getvalue()).decode()})


@pytest.mark.parametrize(
    "stored, found, difference",
    [
        ([printed("loss 1.2345\n")], [printed("loss 1.2345\n")], None),
        ([printed("one\n"), figure(0.5)], [figure(0.5), printed("one\n")], None),  # figures come after the text
        ([printed("one\n"), printed("two\n")], [printed("one\ntwo\n")], None),
        ([printed("<f at 0x7f00deadbeef>\n")], [printed("<f>\n")], None),
        ([printed("loss 1.2345\n")], [printed("loss 1.2346\n")], None),  # both rounded
        ([printed("loss 1.2345\n")], [printed("loss 1.2347\n")], "line 1: stored 'loss 1.2345', now 'loss 1.2347'"),
        ([printed("a -1.0e-03 b\n")], [printed("a  -1.1e-03 b\n")], None),
        ([printed("a 1.0e-03 b\n")], [printed("a 1.2e-03 b\n")], "line 1"),
        ([value("0.33333334")], [value("0.3333343")], None),
        ([value("0.33333334")], [value("0.3333400")], "value, line 1"),
        ([value("nan")], [value("0.5")], "value, line 1"),
        ([printed("128 calls\n")], [printed("129 calls\n")], "printed text, line 1"),  # integers are not rounded
        ([printed("a\nb\n")], [printed("a\n")], "stored 2 lines, now 1"),
        ([printed("sunk\n")], [printed("sank\n")], "line 1"),
        ([figure(0.5)], [figure(0.5 * (1 + 2**-17))], None),
        ([figure(0.5)], [figure(0.505)], "pixels differ"),  # by one pixel
        ([figure(0.5)], [figure(0.5, 1.9)], "stored 200 x 100 pixels, now 190 x 100"),
        ([figure(0.5)], [], "stored figure, now nothing"),
        ([], [value("3")], "stored nothing, now value: '3'"),
        ([figure(0.5)], [figure(0.5), figure(0.5)], "stored figure, now figure, figure"),
        ([value("3")], [printed("3\n")], "stored value, now printed text"),
    ],
)
def test_outputs_are_compared(stored, found, difference):
    said = load("outputs").differences(code("x", outputs=stored), found)
    assert said == [] if difference is None else len(said) == 1 and difference in said[0]


def test_what_varies_is_marked():
    outputs = load("outputs")
    timed = code("#| varies time", "x", outputs=[printed("3.1 ms\n")])
    assert outputs.differences(timed, [printed("4.7 ms\n")]) == []
    assert "stored printed text, now nothing" in outputs.differences(timed, [])[0]
    assert "now printed text, figure" in outputs.differences(timed, [printed("4 ms\n"), figure(0.5)])[0]
    silent = code("#| varies machine", "x")
    assert "without output" in outputs.misused(silent) and "without output" in outputs.differences(silent, [])[0]
    assert "stored nothing" in outputs.differences(silent, [printed("3.1 ms\n")])[0]
    odd = code("#| varies sometimes", "x", outputs=[printed("3.1 ms\n")])
    assert "one of time, machine" in outputs.differences(odd, [printed("3.1 ms\n")])[0]


# ---- run_notebooks_tests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cells, good, line",
    [
        ([code("assert 1 + 1 == 2")], True, "1 of 1 code cells"),
        ([code("#| notest", "1 / 0"), code("x = 1")], True, "1 of 2 code cells"),
        ([code("assert 1 + 1 == 3")], False, "AssertionError"),
        ([code("import time", "time.sleep(3600)")], False, "still running after 8 s"),
        ([code("import os", "os._exit(3)")], False, "ended with 3"),
        ([code("#| eval: false", "1 / 0")], False, "no cell ran"),
    ],
)
def test_notebooks_are_run_counted_and_ended(tmp_path, cells, good, line):
    path = write(tmp_path / "x.ipynb", prose("# X"), *cells)
    passed, said = load("run_notebooks_tests").run(path, 8 if "after 8 s" in line else 900)
    assert passed is good and line in said


def test_a_run_is_compared_with_what_is_stored(tmp_path):
    runs, notebooks = load("run_notebooks_tests"), load("notebooks")
    cells = [
        code("#| hide", "import time, matplotlib.pyplot as plt", id="imports"),
        code("print(2 / 3)", "2 + 3;", id="number"),
        code("plt.figure(figsize=(1, 1)).gca().plot([1, 2]);", id="figure"),
        code("[1, 2]", id="missing"),
        code("x = 1", id="extra"),
        code("#| varies time", "time.perf_counter()", id="timing"),
    ]
    path = write(tmp_path / "x.ipynb", prose("# X"), *cells)
    path.write_text(notebooks.execute(path, 120)[0])
    passed, said = runs.run(path, 60)
    assert passed, said

    stored = json.loads(path.read_text())
    by_id = {cell["id"]: cell for cell in stored["cells"]}
    by_id["number"]["outputs"][0]["text"] = ["0.667\n"]
    by_id["figure"]["source"] = ["plt.figure(figsize=(1, 1)).gca().plot([2, 1]);"]
    by_id["missing"]["source"] = ["[1, 2];"]
    by_id["extra"]["source"] = ["1"]
    by_id["timing"]["outputs"][0]["data"]["text/plain"] = ["-1.0"]
    path.write_text(json.dumps(stored))
    passed, said = runs.run(path, 60)
    found = [line.split(": ", 1) for line in said.splitlines()[1:]]
    assert not passed and [where.strip() for where, _ in found] == [
        "cell 3 (number)", "cell 4 (figure)", "cell 5 (missing)", "cell 6 (extra)"
    ]  # fmt: skip
    for (_, why), part in zip(found, ("line 1: stored '0.667'", "pixels differ", "now nothing", "now value: '1'")):
        assert part in why


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
        "::: {.callout-note}\nsee [it](01_config.ipynb#x)\n:::\n\n## Head {#sec-a}", {"01_config.ipynb": "config.html"}
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


# ---- run_tests -------------------------------------------------------------------------------------------------------


def test_all_parts_run_and_the_failed_ones_are_named(monkeypatch, capfd):
    module = load("run_tests")
    python = [sys.executable, "-c"]
    commands = {
        "notebooks": (
            [*python, "import os; print('threads', os.environ['OMP_NUM_THREADS'])"],
            {"OMP_NUM_THREADS": "3"},
        ),
        "second": ([*python, "raise SystemExit(2)"], {}),
        "third": (["/nowhere/at/all"], {}),
        "tests": ([*python, "print('the last part ran')"], {}),
    }
    monkeypatch.setattr(module, "parts", lambda: {name: command for name, (command, _) in commands.items()})
    assert module.run(commands) == ["second", "third"]
    monkeypatch.setattr(sys, "argv", ["run_tests.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert module.main() == 1
    shown = capfd.readouterr().out.splitlines()
    assert "threads 3" in shown and "threads 1" in shown and shown.count("the last part ran") == 2
    assert shown[-2:] == ["failed: second; third", "parts: 2 passed, 2 failed"]


def test_the_portable_runs_take_every_kernel_and_number_of_threads():
    settings = {
        (v["ATEN_CPU_CAPABILITY"], v["OMP_NUM_THREADS"], n.split(",")[0])
        for n, (_, v) in load("run_tests").portable().items()
    }
    assert settings == set(itertools.product(("default", "avx2"), ("1", "3"), ("notebooks", "tests")))
    code = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    for _, variables in list(load("run_tests").portable().values())[::2]:
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)
        capability, threads = done.stdout.split()
        assert capability.lower() == variables["ATEN_CPU_CAPABILITY"]
        assert threads in (variables["OMP_NUM_THREADS"], str(os.cpu_count()))  # MKL starts no more than there are cores
