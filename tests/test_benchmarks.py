"""The harness of the benchmarks: what it counts, relates and refuses."""

import ast
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import drawn
from hypothesis import given

from dilated_attention_nb import benchmarks
from dilated_attention_nb.benchmarks import (
    FORWARD_ONLY,
    LABELS,
    LARGE,
    NOTES,
    REACH,
    SQUARE,
    WINDOW,
    WORSE,
    Limits,
    Work,
    attention_work,
    dilated_pairs,
    from_diagonal,
    in_turn,
    label,
    left_out,
    measure_limits,
    method,
    missing_rows,
    ratio,
    read_results,
    regressions,
    run_sections,
    seconds_of,
    to_diagonal,
    torchscale_attention,
)
from dilated_attention_nb.testing import attention_cases, make_qkv, oracle_attention, oracle_counts


@drawn(100)
@given(attention_cases())
def test_pairs_are_those_of_the_oracle(case):
    n, h = case.nk, case.h
    ws, rs = case.segment_lengths, case.dilation_rates
    options = {"is_causal": case.is_causal, "mixing": case.mixing}
    counts, _ = oracle_counts(n, n, h, ws, rs, ragged="mask", **options)
    assert dilated_pairs(n, h, ws, rs, **options) == int(counts.sum())


@pytest.mark.parametrize(("n", "h", "w", "r"), [(12, 4, 4, 2), (13, 3, 5, 2), (7, 5, 7, 3), (16, 1, 8, 1)])
def test_the_diagonal_keeps_the_grid_and_comes_back(n, h, w, r):
    x = 1 + torch.arange(2.0 * n * h * 3).view(2, n, h, 3)
    back = from_diagonal(to_diagonal(x, w, r), w, r, n, h, -1.0)
    per = -(-h // r)
    for i in range(n):
        for head in range(h):
            kept = (i % w) % r == head // per
            assert torch.equal(back[:, i, head], x[:, i, head] if kept else torch.full((2, 3), -1.0))


@pytest.mark.parametrize("is_causal", [False, True])
def test_torchscale_attention_is_the_oracle_at_whole_lengths(is_causal):
    q, k, v = make_qkv(2, 16, 4, 8, dtype=torch.float64)
    options = dict(is_causal=is_causal, mixing="softmax")
    expected = oracle_attention(q, k, v, (4, 16), (1, 4), **options)[0]
    for exact in (False, True):
        got = torchscale_attention(q, k, v, (4, 16), (1, 4), is_causal, exact)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_runs_take_turns_and_ratios_are_paired():
    order, now = [], [0.0]
    pace = iter([1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 1.0, 1.0])

    def run(name, takes):
        order.append(name)
        now[0] += takes * next(pace)

    runs = {"a": lambda: run("a", 2.0), "b": lambda: run("b", 1.0)}
    seconds = in_turn(runs, 3, clock=lambda: now[0])
    assert order == ["a", "b"] * 4 and seconds["a"] == [2.0, 10.0, 2.0]
    assert ratio(seconds, "a", "b") == 2.0
    pace = iter([7.0])
    assert in_turn({"a": runs["a"]}, 0, clock=lambda: now[0]) == {"a": [14.0]}


@pytest.mark.parametrize(("repeats", "rounds"), [(2, 5), (0, 1)])
def test_cuda_is_timed_between_events_that_are_waited_for(repeats, rounds, monkeypatch):
    "With a stand-in for the device: its clock runs only when it works, and it works only when somebody waits."
    log, queue, now = [], [], [0.0]

    def drain():
        while queue:
            queue.pop(0)()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at = None

        def record(self):
            log.append("record")
            queue.append(lambda: setattr(self, "at", now[0]))

        def synchronize(self):
            log.append("wait")
            drain()

        def elapsed_time(self, end):
            return end.at - self.at  # milliseconds; a TypeError if one of them was not waited for

    class Device:
        def __init__(self, name):
            log.append(name)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            log.append("left")

    def launch(ms):
        log.append("run")
        queue.append(lambda: now.__setitem__(0, now[0] + ms))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (log.append("synchronize"), drain()))
    launch(1e6)  # work of somebody before, still under way
    log.clear()
    assert seconds_of(lambda: launch(3.0), "cuda:1") == pytest.approx(3e-3)
    assert log == ["cuda:1", "synchronize", "record", "run", "record", "wait", "left"]
    slow = iter([50.0, 40.0, 30.0, 5.0, 7.0])  # kernels are compiled first
    log.clear()
    seconds = in_turn({"a": lambda: launch(next(slow)), "b": lambda: launch(1.0)}, repeats, device="cuda")
    assert log.count("run") == 2 * rounds and list(seconds) == ["a", "b"]
    assert seconds["a"] == pytest.approx([5e-3, 7e-3] if repeats else [50e-3])


def test_limits_bound_by_arithmetic_or_by_memory():
    limits = Limits(100.0, 10.0)
    assert limits.seconds(Work(1000.0, 1.0)) == 10.0 and limits.seconds(Work(1.0, 1000.0)) == 100.0
    assert limits.share(Work(1000.0, 1.0), 20.0) == 0.5
    work, both = (attention_work(10, 100, 8, 2, backward) for backward in (False, True))
    assert (work.flops, work.bytes) == (320.0, 800.0) and (both.flops, both.bytes) == (1120.0, 2400.0)
    measured = measure_limits(torch.float32, size=64, mib=1)
    assert measured.flops > 0 and measured.bandwidth > 0


ORIGIN = {"device": "cpu", "processor": "p", "threads": 1}


def section(**figures):
    return ORIGIN | {"rows": [{"n": 8, "method": "m", "ms": 1.0} | figures]}


@pytest.mark.parametrize(
    ("figure", "stored", "got", "worse"),
    [
        ("ratio", 1.0, 1.09, False), ("ratio", 1.0, 1.2, True), ("ratio", 1.0, 0.5, False),
        ("speedup", 10.0, 8.0, True), ("speedup", 10.0, 9.5, False), ("peak_mib", 100.0, 120.0, True),
        ("share", 0.8, 0.9, False), ("share", 0.8, 0.6, True),
    ],
)  # fmt: skip
def test_what_became_worse_is_named(figure, stored, got, worse):
    found = list(regressions("s", section(**{figure: stored}), section(**{figure: got}, ms=99.0)))
    assert len(found) == worse
    if worse:
        assert str(found[0]).startswith(f"s, n 8, method m: {figure} {got:.3g}, stored {stored:.3g}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"processor": "q"}, "processor must be that of the stored section"),
        ({"threads": 2}, "threads must be that of the stored section"),
        ({"rows": [{"n": 9, "ratio": 1.0}]}, "rows must have some in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        list(regressions("s", section(ratio=1.0), section(ratio=1.0) | change))


def test_sections_are_stored_one_by_one_and_checked(tmp_path, capsys):
    file, values = tmp_path / "r.json", iter([1.0, 2.0, 1.0, 3.0])
    sections = {"a": lambda: {"rows": [{"n": 1, "ratio": next(values)}]}, "b": lambda: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        run_sections("About.", file, sections, [])
    assert list(read_results(file)) == ["a"]  # what was measured before the failure is kept
    assert run_sections("About.", file, {"a": sections["a"]}, ["--check", "a"]) == 1
    assert "worse: a, n 1: ratio 2" in capsys.readouterr().out
    assert run_sections("About.", file, sections, ["--check", "a", "--slack", "0.01"]) == 0
    assert json.loads(file.read_text())["a"]["rows"][0]["ratio"] == 1.0
    for argv, words in ((["c"], "unknown section c; there are a, b"), (["--check", "b"], "1 / 0")):
        with pytest.raises((SystemExit, ZeroDivisionError)):
            run_sections("About.", file, sections, argv)
        assert words in capsys.readouterr().err or words == "1 / 0"
    with pytest.raises(SystemExit):
        run_sections("About.", tmp_path / "none.json", {"a": sections["a"]}, ["--check"])
    assert "no section a to compare with" in capsys.readouterr().err


def test_a_check_on_another_machine_is_refused_before_it_measures(tmp_path, capsys):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"a": ORIGIN | {"processor": "another", "rows": [{"n": 1, "ratio": 1.0}]}}))
    with pytest.raises(SystemExit):
        run_sections("About.", file, {"a": lambda: 1 / 0}, ["--check"])
    assert "a: processor must be that of the stored section" in capsys.readouterr().err


def test_what_is_no_longer_measured_is_said(tmp_path, capsys):
    file, ns = tmp_path / "r.json", iter([(1, 2), (1,)])
    sections = {"a": lambda: {"rows": [{"n": n, "ratio": 1.0} for n in next(ns)] + [{"n": 9, "left_out": "slow"}]}}
    assert run_sections("About.", file, sections, []) == 0
    assert run_sections("About.", file, sections, ["--check"]) == 0
    out = capsys.readouterr().out
    assert "not measured again: a, n 2" in out and "n 9" not in out
    assert missing_rows({"rows": [{"n": 1, "share": 1.0}]}, {"rows": [{"n": 1, "share": 2.0}]}) == []


ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "benchmarks").glob("*.json"))
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
APART = {  # what they store is looked at, not compared: events, single runs of training, seconds and bytes of a model
    ("ring", "trace"), ("block_sparse_ring", "trace"), ("comparison", "quality"), ("distributed", "time"),
    ("distributed", "bytes"), ("elastic", "restart"),
}  # fmt: skip
STORED = [(p.stem, name) for p in RESULTS if p.with_suffix(".py") in SCRIPTS for name in read_results(p)]


def later(key, value):
    "A field as another day might measure it: compared figures a fifth worse, times anything, the rest as it was."
    if key in WORSE:
        return value * (1 + 0.2 * WORSE[key])
    if key in NOTES or key not in LABELS and isinstance(value, (float, list)):
        return "2001-01-01" if key == "date" else None
    return value


@pytest.mark.parametrize(("file", "name"), [x for x in STORED if x not in APART])
def test_every_stored_section_can_be_compared(file, name):
    "With itself: nothing is worse. With every figure a fifth worse: each is named."
    section = read_results(ROOT / "benchmarks" / f"{file}.json")[name]
    assert not list(regressions(name, section, section))
    worse = [{k: later(k, v) for k, v in row.items()} for row in section["rows"]]
    found = list(regressions(name, section, section | {"rows": worse}))
    figures = sum(k in WORSE and v != 0 for row in worse for k, v in row.items())
    assert len(found) == figures > 0
    labels = [label(row) for row in section["rows"]]
    assert len(set(labels)) == len(labels), "two rows say the same of what they measured"


def test_a_section_without_rows_is_said_to_be_left_out(tmp_path, capsys):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"trace": ORIGIN | {"events": []}}))
    assert run_sections("About.", file, {"trace": lambda: 1 / 0}, ["--check"]) == 0
    assert "trace has no rows of figures, so nothing is compared" in capsys.readouterr().out


def script(path: Path):
    "A file of benchmarks/ as a module; importing it measures nothing."
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    threads, variables = torch.get_num_threads(), dict(os.environ)
    try:
        spec.loader.exec_module(module)
    finally:
        os.environ.clear()
        os.environ.update(variables)
        sys.path.remove(str(path.parent))
        torch.set_num_threads(threads)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_scripts_have_no_harness_of_their_own(path):
    "Sections by the names that are stored; times, options and files are `benchmarks`' business."
    tree = ast.parse(path.read_text())
    called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert "run_sections" in called and not called & {"json.dumps", "RESULTS.write_text"}
    module, stored = script(path), read_results(path.with_suffix(".json"))
    assert stored.keys() <= getattr(module, "SECTIONS", {"phase_1_1": None}).keys()


def test_equal_budgets_are_equal():
    "By the costs taken in turn every model gets the same time; and on the other side the same steps."
    comparison = script(ROOT / "benchmarks/comparison.py")
    names = list(comparison.demos())
    ms = {name: [200.0 + 10 * i, 300.0 + 90 * i, 900.0 + 400 * i] for i, name in enumerate(names)}
    rows = [{"model": name, "n": n, "ms": x} for name in names for n, x in zip((2048, 4096, 16_384), ms[name])]
    plans = list(comparison.quality_plans({"rows": rows}))
    in_time = {name: plan for equal, name, _, plan in plans if equal == "time"}
    assert len(comparison.SEEDS) > 1, "one run says nothing about another"
    assert list(in_time) == names
    for name, plan in in_time.items():
        assert [n for n, _ in plan] == [2048, 4096, 16_384]
        spent = sum(count * x / 1e3 for (_, count), x in zip(plan, ms[name]))
        assert abs(spent - comparison.SECONDS) <= sum(ms[name]) / 2e3  # each stage ends within half a step of its share
    same = [(name, seed, plan) for equal, name, seed, plan in plans if equal == "steps"]
    assert {plan for *_, plan in same} == {in_time[comparison.ORIGINAL]}
    others = set(names) - comparison.SAME  # these are one model, and the original takes these steps anyway
    assert {x[:2] for x in same} == {(name, seed) for name in others for seed in comparison.SEEDS}
    assert len(same) == len(set(same)) and len(plans) == len(same) + len(names) * len(comparison.SEEDS)


def test_what_is_left_out_says_why():
    assert left_out("dense", 131_072, False) == "" and left_out("dense", 262_144, False) == SQUARE
    assert left_out("flex", 4096, False) == "" and left_out("flex", 4096, True) == FORWARD_ONLY
    assert left_out("standard", 2_097_152, False) == LARGE
    assert not any(left_out("improved", 2**p, p < 21) for p in range(22))


def test_every_method_has_a_row_and_is_related_to_dense_attention(monkeypatch):
    comparison = script(ROOT / "benchmarks/comparison.py")
    reach = {"dense": (256, 128, "too slow"), "improved": (1024, 512, ""), WINDOW: (512, 0, "large")}
    monkeypatch.setattr(benchmarks, "REACH", reach)
    monkeypatch.setattr(comparison, "REACH", reach)
    monkeypatch.setattr(comparison, "SHORT", 64)
    rows = list(comparison.timed((256, 512), ("forward",), torch.float32, lambda n: 0, same=False))
    assert [(r["n"], r["method"], "ms" in r, r.get("left_out")) for r in rows] == [
        (256, "dense", True, None), (256, "improved", True, None), (256, WINDOW, True, None),
        (512, "dense", False, "too slow"), (512, "improved", True, None), (512, WINDOW, True, None),
    ]  # fmt: skip
    assert all("ratio" in r for r in rows if "ms" in r) and label(rows[3]) == "n 512, what forward, method dense"
    rows = list(comparison.timed((128,), comparison.BOTH, torch.float32, lambda n: 1))
    assert [r["ratio"] for r in rows if r["method"] == "dense"] == [1.0, 1.0]
    assert [r["method"] for r in rows if "ms" in r] == ["dense", "improved", WINDOW, "dense", "improved"]


def test_a_slower_library_is_named(monkeypatch):
    "What `make bench-check` looks at is related to what no change of the library moves."
    comparison = script(ROOT / "benchmarks/comparison.py")
    pace = {name: 1.0 for name in REACH}
    monkeypatch.setattr(comparison, "passes", lambda n, dtype, both, names: {name: name for name in names})
    monkeypatch.setattr(comparison, "in_turn", lambda runs, repeats: {name: [pace[name]] for name in runs})
    stored = ORIGIN | comparison.quick()
    pace["improved"] = 1.5
    assert {r.row.split(", method ")[1] for r in regressions("quick", stored, ORIGIN | comparison.quick())} == {
        "improved"
    }
    pace["improved"] = 0.5
    assert not list(regressions("quick", stored, ORIGIN | comparison.quick()))


def test_labels_and_methods():
    assert label({"n": 8, "rho": 0.1, "ratio": 1.0, "ms": 2.0, "dtype": "float32"}) == "n 8, rho 0.1, dtype float32"
    q, k, v = make_qkv(1, 256, 2, 8)
    for name in REACH.keys() - {"flex"}:
        assert method(name, 256, 2, True)(q, k, v).shape == q.shape
    with pytest.raises(ValueError, match="name must be one of dense"):
        method("sparse", 256, 2, True)
    assert {"device", "processor", "threads", "torch", "date"} <= benchmarks.environment().keys()
