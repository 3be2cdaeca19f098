"""Pictures stay small, show what they are given, refuse what they cannot show, and leave no trace."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dilated_attention_nb import plotting
from dilated_attention_nb.config import DilatedAttentionConfig
from dilated_attention_nb.plotting import (
    caption,
    finest_branch,
    head_branches,
    naive_mask,
    pattern_codes,
    plot_branches,
    plot_curves,
    plot_mask,
    plot_masks,
    plot_patterns,
    plot_reach,
    plot_schedule,
    plot_training,
    reached,
    save_figure,
    smoothed,
)

ROOT = Path(__file__).resolve().parent.parent
GROUPS = DilatedAttentionConfig((4, 8, 16), (1, 2, 4))
SOFTMAX = DilatedAttentionConfig((4, 8, 16), (1, 2, 4), mixing="softmax")
RECORD = {"device": "cpu", "dtype": "float32", "threads": 2, "date": "2025-01-01", "name": "a", "n": 1024, "s": 0.5}
ROWS = [{"step": i, "loss": 1.0 / (i + 1)} for i in range(50)]
DRAWN = {
    "mask": lambda: plot_mask(naive_mask(16, 8, 2)),
    "wide mask": lambda: plot_mask(torch.ones(2, 200)),
    "tall mask": lambda: plot_mask(torch.ones(200, 2)),
    "one token": lambda: plot_mask([[True]]),
    "on a graph": lambda: plot_mask(torch.ones(4, 4, requires_grad=True)),
    "masks": lambda: plot_masks(torch.ones(9, 16, 16)),
    "two masks": lambda: plot_masks(np.ones((2, 4, 4)), ["a", "b"]),
    "groups": lambda: plot_branches(GROUPS, 32, 7),
    "ragged": lambda: plot_branches(SOFTMAX, 13, 5),
    "many heads": lambda: plot_branches(SOFTMAX, 64, 32),
    "patterns": lambda: plot_patterns(SOFTMAX),
    "one branch": lambda: plot_patterns(DilatedAttentionConfig((8,), (1,)), n=8, is_causal=False, num_heads=1),
    "reach": lambda: plot_reach(naive_mask(16, 8, 2), 15, 5),
    "schedule": lambda: plot_schedule([(r, s, f"kv {s}") for r in range(12) for s in range(12)], title="long"),
    "curves": lambda: plot_curves([RECORD, RECORD | {"n": 2048}], "n", "s", "name", per="n", unit="s", target=1.1),
    "training": lambda: plot_training(ROWS, references={"gzip -9": 0.5, "lzma": 0.4}),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_pictures_are_small_and_leave_no_trace(draw, tmp_path):
    before = plt.rcParams.copy()
    drawn = draw()
    figure = getattr(drawn, "figure", drawn)
    assert (figure.get_size_inches() <= (6, 4)).all() and figure.dpi == 100
    save_figure(drawn, tmp_path / "a.png")
    save_figure(draw(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()  # drawn twice, the same file
    assert len((tmp_path / "a.png").read_bytes()) < 80_000 and not plt.get_fignums()
    assert plt.rcParams == before


def test_axes_that_are_given_are_used():
    figure, axes = plt.subplots(2, 3)
    given = iter(axes.flat)
    assert all(
        draw(ax) is ax
        for draw, ax in zip(
            (
                lambda ax: plot_mask(np.ones((3, 3)), ax),
                lambda ax: plot_branches(GROUPS, 16, 3, ax),
                lambda ax: plot_reach(np.ones((3, 3)), 0, ax=ax),
                lambda ax: plot_schedule([(0, 0, "a")], ax),
                lambda ax: plot_curves([RECORD], "n", "s", "name", ax=ax),
                lambda ax: plot_training(ROWS, ax=ax),
            ),
            given,
        )
    )
    assert plt.get_fignums() == [figure.number]
    plt.close(figure)


BAD = [
    (lambda: plot_mask(torch.ones(2, 3, 3)), "mask must be .* got .*3, 3.*plot_masks"),
    (lambda: plot_masks([]), "masks must .* got none"),
    (lambda: plot_branches(GROUPS, 16, 2), "num_heads must be at least"),
    (lambda: plot_branches(SOFTMAX, 16, 0), "num_heads must be at least 1"),
    (lambda: reached(np.ones((3, 3)), 3, 1), "token must be one of 0 ... 2, got 3"),
    (lambda: plot_schedule([]), "rows must .* got none"),
    (lambda: plot_curves([], "n", "s", "name"), "records must .* got none"),
    (lambda: plot_training(ROWS, ("los",)), "y must name fields of the rows, got 'los'; there are: step, loss"),
    (lambda: plot_training([]), "no rows"),
    *((lambda k=k: caption([{**RECORD, k: None}]), f"got no {k}") for k in ("device", "dtype", "threads", "date")),
]


@pytest.mark.parametrize(("call", "says"), BAD)
def test_what_cannot_be_shown_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
    plt.close("all")


@pytest.mark.parametrize("mixing", ["groups", "softmax"])
@pytest.mark.parametrize("offsets", ["blocked", "interleaved"])
@pytest.mark.parametrize("num_heads", [3, 4, 5, 12])
def test_pictures_show_the_convention(mixing, offsets, num_heads):
    config = DilatedAttentionConfig((4, 8, 16), (1, 2, 4), mixing=mixing, offsets=offsets)
    heads = head_branches(config, num_heads)
    assert len(heads) == num_heads
    for h, pairs in enumerate(heads):
        if mixing == "groups":
            sizes = [len(part) for part in np.array_split(np.arange(num_heads), 3)]  # larger parts first
            assert pairs == [(g := int(np.repeat([0, 1, 2], sizes)[h]), g % config.dilation_rates[g])]
        else:
            blocked = [h // -(-num_heads // r) for r in (1, 2, 4)]
            assert pairs == list(enumerate(blocked if offsets == "blocked" else [h % r for r in (1, 2, 4)]))
        codes = pattern_codes(config, 16, True, h, num_heads)
        assert not np.triu(codes, 1).any() and (finest_branch(codes) > 0).sum() == codes.any(axis=0).sum()


def test_means_are_not_biased_towards_zero():
    rng = np.random.default_rng(0)
    values = rng.normal(size=30).tolist()
    assert np.allclose(smoothed(values, 0), values)
    weights = 0.9 ** np.arange(30)[::-1]
    assert np.isclose(smoothed(values, 0.9)[-1], np.average(values, weights=weights))


# ---- one look for all notebooks --------------------------------------------------------------------------------------


def unstyled(sources: list[str]) -> list[int]:
    "Cells that draw a figure without `STYLE`: neither by a function of `plotting` nor within it, nor after it is set."
    drawn = re.compile(rf"\b({'|'.join(name for name in plotting.__all__ if name.startswith('plot_'))})\(")
    found, styled = [], False
    for number, source in enumerate(sources):
        styled |= re.search(r"^plt\.rcParams\.update\(STYLE", source, re.MULTILINE) is not None
        own = re.search(r"plt\.(subplots|figure|subplot_mosaic)\(", source)
        shown = "fig-alt" in source and not drawn.search(source)
        if (own or shown) and not styled and "rc_context(STYLE" not in source:
            found.append(number)
    return found


NOTEBOOKS = [p for p in [ROOT / "index.ipynb", *sorted((ROOT / "nbs").rglob("*.ipynb"))] if ".ipynb_" not in str(p)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_of_notebooks_have_one_look(path):
    "The functions of `plotting` set it themselves, which the tests above show."
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in cells]
    assert unstyled([source for source in sources if not source.startswith("#| export")]) == []


@pytest.mark.parametrize(
    "sources,wanted",
    [
        (["_, ax = plt.subplots()"], [0]),
        (["with plt.rc_context(STYLE):\n    _, ax = plt.subplots()"], []),
        (["_, ax = plt.subplots()", "plt.rcParams.update(STYLE)", "plt.figure()"], [0]),
        (['#| fig-alt: "a mask"\nplot_mask(mask)'], []),
        (['#| fig-alt: "a curve"\ndraw(curve)'], [0]),
    ],
)
def test_figures_without_the_look_are_found(sources, wanted):
    assert unstyled(sources) == wanted
