"""Runs that are interrupted, resumed, damaged or misdirected, as real processes; and the arithmetic of the loop."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dilated_attention_nb import command, runs
from dilated_attention_nb.command import launched_run
from dilated_attention_nb.corpus import (
    SEPARATOR,
    SKIPPED,
    VOCAB,
    held_out,
    read_corpus,
    text_files,
    to_bytes,
    to_tokens,
)
from dilated_attention_nb.embeddings import NgramEmbedding
from dilated_attention_nb.files import open_tensors, owned, write_file, write_tensors
from dilated_attention_nb.longnet import LongNet, LongNetConfig, LongNetEncoder
from dilated_attention_nb.pretrained import from_pretrained
from dilated_attention_nb.processes import spawn_gloo
from dilated_attention_nb.runs import load_run, read_metrics
from dilated_attention_nb.sharded import Team
from dilated_attention_nb.training import (
    TrainingConfig,
    bits_per_byte,
    fit,
    learning_rate,
    load_checkpoint,
    make_model,
    make_optimizers,
    make_plan,
    plan_of_steps,
    sample_tokens,
    save_checkpoint,
    stage_of,
    train_step,
    training_batch,
)

LONG = 1200  # seconds: a bound for processes that hang, far beyond what a busy machine needs
ROOT = Path(__file__).resolve().parent.parent
OWN = dict(vocab_size=VOCAB, position="rope", tie_embeddings=False, bias=False, ngrams=(2, 3, 4, 5, 6), ngram_rows=256)
TINY = LongNetConfig(32, 1, 2, (64, 256), (1, 4), **OWN)
CONFIG = TrainingConfig(TINY, "", ((64, 6), (256, 4)), context=256)
SIZE = "--context 256 --width 32 --layers 1 --segments 64 256 --rates 1 4 --eval-bytes 2048 --device cpu".split()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    "A folder of 40 small texts."
    folder = tmp_path_factory.mktemp("words")
    for i in range(40):
        (folder / f"part{i}.txt").write_text("".join(f"line {j} of {i * j % 97}\n" for j in range(i, i + 60)))
    return folder


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "dilated_attention_nb.training", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def demo(*arguments) -> tuple[int, str, str]:
    "Exit status, standard output and standard error of the command."
    process = start(*arguments)
    out, err = process.communicate(timeout=LONG)
    return process.returncode, out, err


@pytest.fixture
def here(monkeypatch, capsys):
    "The command in this process: a start saved, and the seconds in which it measures how fast attention is."
    monkeypatch.setattr(runs, "forward_seconds", lambda *_: 1.0)

    def run(*arguments) -> tuple[int, str, str]:
        torch.set_num_threads(1)  # as in the others, so that sums are the same
        return command.demo([*map(str, arguments)]), *capsys.readouterr()

    return run


def losses(run: Path) -> list[float]:
    return [row["bits_per_byte"] for row in read_metrics(run)]


def content(folder: Path) -> dict[str, str]:
    "What lies in a folder, by name."
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    "A run of 100 steps that nothing interrupted."
    out = tmp_path_factory.mktemp("whole")
    status, said, err = demo("--text", words, "--steps", 100, "--out", out, *SIZE)
    assert status == 0, err
    return out / "longnet", said, err


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(whole):
    run, said, err = whole
    expected = "config.json context.png loss.png metrics.jsonl model.safetensors results.json sample.txt speed.png"
    assert sorted(path.name for path in run.iterdir()) == expected.split()
    results = json.loads((run / "results.json").read_text())
    assert [r["context"] for r in results["contexts"]] == [16, 32, 64, 128, 256, 512]
    assert {r["attention"] for r in results["speed"]} == {"dilated", "dense"}
    assert len(losses(run)) == results["steps"] == 100 and losses(run)[-1] < losses(run)[0] - 3
    for word in ("gzip -9", "lzma", "context 256", "bits per byte", "sample.txt"):
        assert word in said
    for word in ("bits/byte", "B/s", "00:"):  # of the progress bar
        assert word in err


def test_a_run_can_be_loaded(whole):
    model, config = load_run(whole[0])
    results = json.loads((whole[0] / "results.json").read_text())
    corpus = read_corpus(config.text)
    assert config.digest == corpus.digest
    found = bits_per_byte(model, config, corpus.held[: results["held_bytes"] + 1], 256)
    assert found == pytest.approx(results["bits_per_byte"], rel=0.02)


def as_in_0_1(about):
    "What version 0.1 wrote into config.json, and beside tensors."
    model, training = dict(about["config"]), about["training"]
    ngrams = {name: model.pop(name) for name in ("ngrams", "ngram_rows")}
    return json.dumps({"model": model, **training, **ngrams})


def test_the_demos_model_is_a_model_on_disk(whole, tmp_path):
    "`from_pretrained` takes the folder, `generate` works on it, and what is saved again is the same."
    (run, _, _), prompt = whole, torch.arange(97, 122)[None]
    model, config = load_run(run)
    for again in (from_pretrained(run), LongNet.from_pretrained(run)):
        assert type(again) is LongNet and again.config == config.model and not again.training
        for (name, x), y in zip(again.state_dict().items(), model.state_dict().values()):
            assert torch.equal(x, y), name
        assert torch.equal(again(prompt), model(prompt))
        assert torch.equal(again.generate(prompt, 20, seed=3), model.generate(prompt, 20, seed=3))
    greedy = again.generate(prompt, 3, 0.0)[0]  # against the whole sequence read again for each token
    for i in range(3):
        text = torch.cat((prompt, greedy[None, :i]), 1)
        assert greedy[i] == again(text)[0, -1].argmax()
    again.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(prompt), model(prompt))
    with pytest.raises(ValueError, match="holds a LongNet, not a LongNetEncoder"):
        LongNetEncoder.from_pretrained(run)


def test_a_run_of_version_0_1_is_read(whole, tmp_path):
    run = tmp_path / "old"
    run.mkdir()
    about = json.loads((whole[0] / "config.json").read_text())
    about["config"] = TrainingConfig.from_dict(about).model.to_dict()  # 0.1 left nothing out
    (run / "config.json").write_text(as_in_0_1(about))
    save_file(load_file(whole[0] / "model.safetensors"), run / "model.safetensors", {"config": as_in_0_1(about)})
    model, config = load_run(run)
    wanted, same = load_run(whole[0])
    assert config == same and all(torch.equal(x, y) for x, y in zip(model.parameters(), wanted.parameters()))


def test_the_model_of_an_unfinished_run_is_that_of_its_checkpoint(stopped):
    config = TrainingConfig.from_json((stopped / "config.json").read_text())
    model = make_model(config)
    load_checkpoint(stopped / "checkpoint.safetensors", config, model, make_optimizers(model, config))
    again = LongNet.from_pretrained(stopped)
    assert again.config == config.model and not again.training
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), model.parameters()))
    assert len(again.generate(torch.arange(9)[None], 5)[0]) == 5
    with pytest.raises(ValueError, match="holds a LongNet, not a LongNetEncoder"):
        LongNetEncoder.from_pretrained(stopped)


def without_checkpoint(run):
    (run / "checkpoint.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: truncate(run), "checkpoint.safetensors can't be read.*truncated"),
        (lambda run: flipped(run), "checkpoint.safetensors is damaged"),
        (lambda run: broken_config(run), "config.json is no JSON"),
        (lambda run: other_config(run), "config.json must be the one that checkpoint.safetensors was saved with"),
        (lambda run: other_model(run), "checkpoint.safetensors doesn't fit this LongNet: .*tables"),
        (without_checkpoint, "has no model.safetensors, nor a checkpoint: a run saves its first"),
    ],
)
def test_a_damaged_unfinished_run_is_no_model(damage, says, stopped):
    damage(stopped)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        LongNet.from_pretrained(stopped)


def interrupted(words, out, number, rows):
    process = start("--text", words, "--steps", 100, "--out", out, *SIZE)
    while len(read_metrics(out / "longnet")) < rows:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(number)
    said, err = process.communicate(timeout=LONG)
    return process.returncode, said, err


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param("SIGINT", 20, marks=pytest.mark.slow),
        pytest.param("SIGTERM", 60, marks=pytest.mark.slow),
        ("SIGHUP", 40),
    ],
)
def test_an_interrupted_run_resumes_as_if_nothing_had_been(name, rows, words, whole, tmp_path, here):
    status, said, err = interrupted(words, tmp_path, getattr(signal, name), rows)
    assert status == 128 + getattr(signal, name), err
    done = len(losses(tmp_path / "longnet"))
    assert rows <= done < 100 and f"step {done} of 100" in said and f"--resume longnet --out {tmp_path}" in said
    assert said.splitlines()[-1].split()[0] == sys.executable  # what it says can be typed
    assert (tmp_path / "longnet/checkpoint.safetensors").exists() and "Traceback" not in err
    status, _, err = here("--resume", "longnet", "--out", tmp_path)
    assert status == 0, err
    assert losses(tmp_path / "longnet") == losses(whole[0])
    mine, theirs = (load_file(run / "model.safetensors") for run in (tmp_path / "longnet", whole[0]))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_run_begins_again_where_it_was_saved(words, whole, tmp_path, here):
    status, *_ = interrupted(words, tmp_path, signal.SIGKILL, 30)
    assert status == -signal.SIGKILL
    with open(tmp_path / "longnet/metrics.jsonl", "a") as file:
        file.write('{"step": 3')  # as far as the disk had got
    status, _, err = here("--resume", "longnet", "--out", tmp_path)
    assert status == 0, err
    assert losses(tmp_path / "longnet") == losses(whole[0])


def test_two_signals_end_it_at_once(words, tmp_path):
    process = start("--text", words, "--steps", 100_000, "--out", tmp_path, *SIZE)
    while len(read_metrics(tmp_path / "longnet")) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(LONG) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert len(read_metrics(tmp_path / "longnet")) >= 3


# ---- what is refused, and that nothing changes then ------------------------------------------------------------------


def test_names_are_never_reused(whole, words, here):
    run = whole[0]
    before = content(run)
    status, _, err = here("--text", words, "--steps", 2, "--out", run.parent, "--name", "longnet", *SIZE)
    assert status == 2 and "name must be new" in err and "--resume" in err and content(run) == before
    status, said, err = here("--text", words, "--steps", 2, "--out", run.parent, *SIZE)
    assert status == 0 and "longnet-2" in said and content(run) == before


def test_a_restart_does_not_take_up_an_earlier_launch_of_the_same_name(tmp_path, monkeypatch):
    "Nor say that it is done because that one was: the first attempt died before it had a folder."
    for attempt in (0, 1):
        (tmp_path / f"logs/nightly_x/attempt_{attempt}/0").mkdir(parents=True)
    names = {"RUN_ID": "nightly", "RESTART_COUNT": "1"}
    names["ERROR_FILE"] = str(tmp_path / "logs/nightly_x/attempt_1/0/error.json")
    for name, value in names.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    began = (tmp_path / "logs/nightly_x/attempt_0").stat().st_mtime
    for name, when in {"before": began - 9, "mine": began + 9, "other": began + 99}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "launch.json").write_text(json.dumps("nightly" if name != "other" else "weekly"))
        os.utime(tmp_path / name / "launch.json", (when, when))
    assert launched_run(tmp_path) == str(tmp_path / "mine")
    (tmp_path / "mine/launch.json").unlink()
    assert launched_run(tmp_path) is None
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")  # another launcher: the name alone
    assert launched_run(tmp_path) == str(tmp_path / "before")


def test_a_finished_run_is_not_resumed(whole, here):
    before = content(whole[0])
    status, _, err = here("--resume", "longnet", "--out", whole[0].parent)
    assert status == 2 and "finished" in err and content(whole[0]) == before


@pytest.fixture
def stopped(words, tmp_path):
    "A run that was interrupted, made in this process."
    corpus = read_corpus(str(words))
    config = replace(CONFIG, digest=corpus.digest, text=str(words))
    run = tmp_path / "stopped"
    run.mkdir()
    model = make_model(config)
    optimizers = make_optimizers(model, config)
    rows = []
    for step in range(3):
        bits = train_step(model, optimizers, config, corpus.train, step)
        rows.append(
            {"step": step, "context": 64, "bytes": 64 * step + 64, "bits_per_byte": bits, "rate": 1, "seconds": 1}
        )
    write_file(run / "config.json", config.described())
    write_file(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    save_checkpoint(run / "checkpoint.safetensors", config, model, optimizers, 3)
    return run


def truncate(run):
    path = run / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def empty(run):
    (run / "checkpoint.safetensors").write_bytes(b"")


def other_config(run):
    config = TrainingConfig.from_json((run / "config.json").read_text())
    write_file(run / "config.json", replace(config, seed=7).described())


def other_model(run):
    config = TrainingConfig.from_json((run / "config.json").read_text())
    other = replace(config, model=replace(config.model, ngram_rows=512))
    model = make_model(other)
    save_checkpoint(run / "checkpoint.safetensors", config, model, make_optimizers(model, other), 3)


def broken_config(run):
    (run / "config.json").write_text("{")


def stepless(run):
    config = TrainingConfig.from_json((run / "config.json").read_text())
    tensors = load_file(run / "checkpoint.safetensors")
    save_file(tensors, run / "checkpoint.safetensors", {"config": config.described()})


def stored_as(run, step=None, change=dict):
    "The checkpoint again, with a hash that is right, but with another step or other tensors."
    path = run / "checkpoint.safetensors"
    with open_tensors(path) as file:
        tensors, metadata = file.tensors(), dict(file.metadata)
    write_tensors(path, change(tensors), metadata | ({} if step is None else {"step": step}))


def negative_step(run):
    stored_as(run, "-1")


def late_step(run):
    stored_as(run, "11")


def no_number(run):
    stored_as(run, "nan")


def endless_step(run):
    stored_as(run, "9" * 5000)


def less_remembered(run):
    stored_as(run, change=lambda tensors: {n: x for n, x in tensors.items() if n != "optimizer.0.0.momentum_buffer"})


def more_remembered(run):
    stored_as(run, change=lambda tensors: tensors | {"optimizer.2.0.step": torch.ones(())})


def other_shape(run):
    stored_as(run, change=lambda tensors: tensors | {"optimizer.1.0.exp_avg": torch.ones(3)})


def other_dtype(run):
    stored_as(run, change=lambda tensors: tensors | {"model.output_projection.weight": torch.ones(257, 32).half()})


def double_memory(run):
    stored_as(run, change=lambda tensors: tensors | {"optimizer.1.0.step": torch.ones((), dtype=torch.float64)})


def flipped(run):
    path = run / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def folder_instead(run):
    (run / "checkpoint.safetensors").unlink()
    (run / "checkpoint.safetensors").mkdir()


def fewer_rows(run):
    path = run / "metrics.jsonl"
    write_file(path, "".join(path.read_text().splitlines(keepends=True)[:2]))


def disordered_rows(run):
    path = run / "metrics.jsonl"
    write_file(path, "".join(reversed(path.read_text().splitlines(keepends=True))))


def rows_of_something_else(run):
    write_file(run / "metrics.jsonl", "[1]\n" * 3)


def absurd_model(run):
    values = json.loads((run / "config.json").read_text())
    values["config"]["num_layers"] = 10**9
    (run / "config.json").write_text(json.dumps(values))


def deep_config(run):
    (run / "config.json").write_text("[" * 100_000)


def wrong_type(run):
    values = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(values | {"training": values["training"] | {"seed": "zero"}}))


def other_device(run):
    if torch.cuda.is_available():
        pytest.skip("CUDA is there")
    config = TrainingConfig.from_json((run / "config.json").read_text())
    write_file(run / "config.json", replace(config, device="cuda").described())


def broken_metrics(run):
    (run / "metrics.jsonl").write_text("no json\n")


def unknown_field(run):
    values = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(values | {"training": values["training"] | {"sed": 1}}))


def other_text(run):
    config = TrainingConfig.from_json((run / "config.json").read_text())
    write_file(run / "config.json", replace(config, digest="0" * 64).described())


def no_config(run):
    (run / "config.json").unlink()


DAMAGE = {
    truncate: "checkpoint must be a whole safetensors file",
    empty: "checkpoint must be a whole safetensors file",
    other_config: "checkpoint must be of this run's configuration",
    other_model: "checkpoint must have this model's parameters",
    stepless: "checkpoint must be of this run's configuration",
    negative_step: "checkpoint must be of a step from 0 to 10, got '-1'",
    late_step: "checkpoint must be of a step from 0 to 10, got '11'",
    no_number: "checkpoint must be of a step from 0 to 10, got 'nan'",
    endless_step: "checkpoint must be of a step from 0 to 10, got '999",
    less_remembered: "checkpoint must have what its optimizers remember",
    more_remembered: "checkpoint must have what its optimizers remember",
    other_shape: "checkpoint must have what its optimizers remember",
    double_memory: "checkpoint must have what its optimizers remember",
    other_dtype: "checkpoint must have this model's parameters",
    flipped: "checkpoint.safetensors is damaged",
    folder_instead: "checkpoint must be a whole safetensors file",
    fewer_rows: "metrics must have the rows of steps 0 to 2, got 2 rows",
    disordered_rows: "metrics must have the rows of steps 0 to 2, got 3 rows",
    rows_of_something_else: "metrics must be rows of step, context",
    absurd_model: "config.json: num_layers must be at most",
    deep_config: "must be the JSON of a TrainingConfig",
    broken_config: "must be the JSON of a TrainingConfig",
    wrong_type: "config.json: seed must be an integer",
    other_device: "device must be there, got 'cuda'",
    broken_metrics: "metrics must be lines of JSON",
    unknown_field: "no field 'sed'; did you mean 'seed'",
    other_text: "text must be what the run began with",
    no_config: "resume must name a run",
}


@pytest.mark.parametrize(("damage", "says"), DAMAGE.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_run_is_refused_and_left_alone(damage, says, stopped, capsys):
    damage(stopped)
    before = content(stopped)
    assert command.demo(["--resume", "stopped", "--out", str(stopped.parent)]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert content(stopped) == before


def test_a_checkpoint_of_version_0_1_is_taken_with_a_word(stopped):
    path, config = stopped / "checkpoint.safetensors", TrainingConfig.from_json((stopped / "config.json").read_text())
    save_file(load_file(path), path, {"config": config.to_json(), "step": "3"})
    model = make_model(config)
    with pytest.warns(UserWarning, match="has no hash, as in version 0.1"):
        assert load_checkpoint(path, config, model, make_optimizers(model, config)) == 3


def test_a_checkpoint_that_is_missing_beside_metrics_is_said(stopped, here):
    (stopped / "checkpoint.safetensors").unlink()
    status, _, err = here("--resume", "stopped", "--out", stopped.parent)
    assert status == 0 and "note: 3 rows of metrics, but no " in err and "begins again at step 0" in err
    assert [row["step"] for row in read_metrics(stopped)] == list(range(10))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_run_has_one_owner(stopped, capsys):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            with owned(stopped):
                os.write(write, b"x")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(read, 1) == b"x"
        before = content(stopped)
        for _ in range(2):
            assert command.demo(["--resume", "stopped", "--out", str(stopped.parent)]) == 2
            said = capsys.readouterr().err
            assert f"to which process {child} writes; wait until it ends" in said
        assert content(stopped) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert command.demo(["--resume", "stopped", "--out", str(stopped.parent)]) == 0
    assert not (stopped / ".lock").exists()


def test_a_run_that_is_damaged_after_its_end_is_not_loaded(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    weights, config = (run / "model.safetensors").read_bytes(), (run / "config.json").read_text()
    for at in (3, 50, len(weights) // 2, len(weights) - 1):
        (run / "model.safetensors").write_bytes(weights[:at] + bytes([weights[at] ^ 4]) + weights[at + 1 :])
        with pytest.raises(ValueError, match="model.safetensors|config.json"):
            load_run(run)
    (run / "model.safetensors").write_bytes(weights)
    for part, other in (("training", {"seed": 7}), ("config", {"rope_base": 5.0})):
        about = json.loads(config)
        (run / "config.json").write_text(json.dumps(about | {part: about[part] | other}))
        with pytest.raises(ValueError, match="config.json must be the one that model.safetensors was saved with"):
            load_run(run)
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: "):
        load_run(run)


def test_a_truncated_checkpoint_as_a_process(stopped):
    truncate(stopped)
    before = content(stopped)
    status, _, err = demo("--resume", "stopped", "--out", stopped.parent)
    assert status == 2 and err.startswith("error: checkpoint must be") and content(stopped) == before


def test_a_refused_checkpoint_changes_neither_model_nor_optimizers(stopped):
    config = TrainingConfig.from_json((stopped / "config.json").read_text())
    truncate(stopped)
    model = make_model(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizers = make_optimizers(model, config)
    with pytest.raises(ValueError, match="checkpoint"):
        load_checkpoint(stopped / "checkpoint.safetensors", config, model, optimizers)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(optimizer.state_dict()["state"] for optimizer in optimizers)


def bad_texts(folder: Path):
    (folder / "empty").mkdir()
    (folder / "blank").mkdir()
    (folder / "blank/a.txt").write_bytes(b"")
    (folder / "binary").mkdir()
    (folder / "binary/a.bin").write_bytes(b"\0" * 5000)
    (folder / "hidden").mkdir()
    (folder / "hidden/.secret").write_text("text")
    (folder / "short.txt").write_text("short")
    return {
        "empty": "0 files",
        "blank": "1 files in",
        "binary": "each empty or not text",
        "hidden": "0 files",
        "missing": "missing: No such file",
        "short.txt": "text must be longer than the context",
    }


def test_text_that_cannot_be_read_is_refused(tmp_path, capsys):
    for name, says in bad_texts(tmp_path).items():
        out = tmp_path / "runs"
        assert command.demo(["--text", str(tmp_path / name), "--steps", "2", "--out", str(out), *SIZE]) == 2, name
        said = capsys.readouterr().err
        assert said.startswith("error: text must") and says in said, (name, said)
        assert not out.exists()


def test_an_empty_folder_as_a_process(tmp_path):
    status, said, err = demo("--text", tmp_path, "--out", tmp_path / "runs", *SIZE)
    assert (status, said) == (2, "") and err.startswith("error: text must contain text, got 0 files")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(words, tmp_path):
    (tmp_path / "locked.txt").write_text("text")
    (tmp_path / "locked.txt").chmod(0)
    status, _, err = demo("--text", tmp_path, "--out", tmp_path / "runs", *SIZE)
    assert status == 2 and "locked.txt: Permission denied" in err


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that exists and can't be read")
def test_a_file_that_fails_to_read_is_named(tmp_path, here):
    status, _, err = here("--text", "/proc/self/mem", "--out", tmp_path / "runs", *SIZE)
    assert status == 2 and "error: text must be readable, got /proc/self/mem: " in err


def test_an_unreadable_folder_is_not_passed_over(words, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="text must be readable, got .*Permission denied"):
        read_corpus(str(words))


FLAGS = [
    (["--steps", "0"], "steps must be at least 1"),
    (["--context", "1"], "context must be at least 16"),
    (["--seed", "-1"], "seed must be at least 0"),
    (["--width", "33"], "head_dim"),
    (["--layers", "0"], "num_layers must be at least 1"),
    (["--layers", "1000000"], "num_layers must be at most 10000"),
    (["--width", "1048576", "--heads", "8192", "--layers", "9999"], "the model must fit into the"),
    (["--width", str(10**9)], "embed_dim must be at most"),
    (["--context", str(10**18)], "context must be at most"),
    (["--heads", "0"], "num_heads must be at least 1"),
    (["--segments", "64"], "segment_lengths must be as long as dilation_rates"),
    (["--rates", "1", "0"], "must be at least 1"),
    (["--eval-bytes", "0"], "eval_bytes must be at least"),
    (["--device", "abacus"], "device must"),
    (["--seed", str(2**63)], "seed must be below 2**63"),
    (["--name", "../x"], "name must"),
    (["--name", ""], "name must"),
    (["--name", "a" * 201], "name must"),
    (["--text", ""], "text must name a file or folder, got an empty name"),
]


@pytest.mark.parametrize(
    ("flags", "says"), FLAGS, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else ""
)
def test_wrong_values_are_refused_before_anything_is_written(flags, says, words, tmp_path, capsys):
    assert command.demo(["--text", str(words), "--steps", "2", "--out", str(tmp_path / "runs"), *SIZE, *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("minutes", "says"),
    [
        ("1e308", "must be at most a million"),
        ("0", "must be above 0"),
        ("nan", "must be finite"),
        ("-1", "must be above 0"),
    ],
)
def test_a_time_is_a_positive_number(minutes, says, words, tmp_path, capsys):
    assert command.demo(["--text", str(words), "--minutes", minutes, "--out", str(tmp_path / "runs"), *SIZE]) == 2
    assert f"minutes {says}" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_time_and_steps_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        command.demo(["--minutes", "1", "--steps", "2"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_run_takes_as_many_steps_as_fit_into_its_time(words, tmp_path, here, monkeypatch):
    "Four fifths of it, less what reading the text took, are for training."
    seconds = [0.02, 0.02, 0.05]
    monkeypatch.setattr(command, "calibrated_seconds", lambda *_: seconds)
    status, said, err = here("--text", words, "--minutes", "0.1", "--out", tmp_path, *SIZE)
    most = sum(steps for _, steps in make_plan(seconds, 0.8 * 6, 256))
    assert status == 0 and 3 <= len(read_metrics(tmp_path / "longnet")) <= most, err


def test_a_folder_that_cannot_be_written_is_named(words, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    status = command.demo(["--text", str(words), "--steps", "2", "--out", str(tmp_path / "file"), *SIZE])
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("error: out must be a folder to write to") and "longnet" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_no_traceback(words, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert command.demo(["--text", str(words), "--steps", "2", "--out", str(tmp_path), *SIZE]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_an_empty_name_is_not_resumed(tmp_path, capsys):
    assert command.demo(["--resume", "", "--out", str(tmp_path)]) == 2
    assert "resume must name a run" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "float8"), ("device", "abacus"), ("context", 3), ("seed", 2**63), ("model", {"embed_dim": 32})],
)
def test_a_configuration_is_checked(field, value):
    with pytest.raises((TypeError, ValueError), match=field):
        replace(CONFIG, **{field: value})


def test_signals_that_come_together_are_one(monkeypatch):
    "`make` passes SIGTERM on to a process that its group's SIGTERM has reached already."
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with command.noted_signals() as noted:
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            assert noted == [signal.SIGINT] * 3
            now[0] = 1.5
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["read_corpus", "calibrated_seconds"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_during_start_up_ends_it_before_anything_is_written(name, where, words, tmp_path, here, monkeypatch):
    real = getattr(command, where)

    def interrupted(*values):
        signal.raise_signal(getattr(signal, name))
        return real(*values)

    monkeypatch.setattr(command, where, interrupted)
    status, _, err = here("--text", words, "--minutes", "0.01", "--out", tmp_path / "runs", *SIZE)
    assert status == 128 + getattr(signal, name) and "nothing was written" in err
    assert not (tmp_path / "runs").exists()


def test_a_signal_while_a_run_is_read_again_loses_nothing(stopped, here, monkeypatch):
    before, real = losses(stopped), command.read_corpus

    def interrupted(text):
        signal.raise_signal(signal.SIGTERM)
        return real(text)

    monkeypatch.setattr(command, "read_corpus", interrupted)
    status, said, _ = here("--resume", "stopped", "--out", stopped.parent)
    assert status == 128 + signal.SIGTERM and "at step 3 of 10" in said and losses(stopped) == before


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with command.noted_signals() as noted:
            signal.raise_signal(signal.SIGHUP)
        assert noted == []
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- steps -----------------------------------------------------------------------------------------------------------


def doubles():
    "A small model in float64, and an optimizer."
    torch.manual_seed(0)
    model = LongNet(TINY).double()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def batches_of(rows, steps=3, n=64):
    numbers = torch.randint(0, VOCAB, (steps * rows, n + 1), generator=torch.Generator().manual_seed(1))
    return [(x[:, :-1], x[:, 1:]) for x in numbers.split(rows)]


@pytest.mark.parametrize("clip", [None, 1e-2])
def test_a_step_of_several_batches_is_the_step_of_them_together(clip):
    (one, first), (several, second) = doubles(), doubles()
    whole = list(fit(one, [first], batches_of(4), clip=clip))
    parts = (pair for x, t in batches_of(4) for pair in zip(x.split(1), t.split(1)))  # any iterable
    added = list(fit(several, [second], parts, accumulate=4, clip=clip))
    assert len(whole) == len(added) == 3 and added == pytest.approx(whole, rel=1e-12)
    assert all(torch.allclose(p, q, rtol=0, atol=1e-9) for p, q in zip(one.parameters(), several.parameters()))


def test_steps_are_those_of_a_plain_loop_with_its_rates_and_clipping():
    (model, optimizer), (plain, usual) = doubles(), doubles()
    rates, bound, wanted = (0.5, 1.0, 0.25), 0.3, []
    for rate, (x, t) in zip(rates, batches_of(2)):
        loss = plain(x, t)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
        for p in plain.parameters():
            p.grad *= min(1.0, bound / (norm + 1e-6))
        usual.param_groups[0]["lr"] = 1e-3 * rate
        usual.step()
        usual.zero_grad()
        wanted.append((loss.item(), norm > bound))
    losses = list(fit(model, [optimizer], batches_of(2), rate=rates.__getitem__, clip=bound))
    assert any(clipped for _, clipped in wanted) and losses == pytest.approx([loss for loss, _ in wanted], rel=1e-12)
    assert all(torch.allclose(p, q, rtol=0, atol=1e-9) for p, q in zip(model.parameters(), plain.parameters()))


def test_the_last_step_takes_the_batches_that_are_left():
    model, optimizer = doubles()
    assert len(list(fit(model, [optimizer], batches_of(1, 5), accumulate=2))) == 3
    assert list(fit(model, [optimizer], [])) == []
    with pytest.raises(ValueError, match="accumulate"):
        next(fit(model, [optimizer], batches_of(1), accumulate=0))


def copies_worker(rank, world, rows, accumulate, clip):
    "Losses and parameters of steps whose sequences are shared by all ranks, a part of each rank's at a time."
    model, optimizer = doubles()
    learner, own = Team().learner(model, copies=True), rows // world
    shares = ((x[rank * own :][:own], t[rank * own :][:own]) for x, t in batches_of(rows))
    parts = (pair for x, t in shares for pair in zip(x.chunk(accumulate), t.chunk(accumulate)))
    losses = list(fit(learner, [optimizer], parts, accumulate=accumulate, clip=clip))
    return losses, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 1e-2)])
def test_copies_take_the_steps_of_one_process_with_the_whole_batch(accumulate, clip):
    ((wanted, parameters),) = spawn_gloo(copies_worker, 1, 4, 1, clip)
    for losses, own in spawn_gloo(copies_worker, 2, 4, accumulate, clip):
        assert losses == pytest.approx(wanted, rel=1e-12)
        assert all(torch.allclose(p, q, rtol=0, atol=1e-9) for p, q in zip(own, parameters))


def test_rows_of_a_step_are_windows_that_follow_in_the_epoch():
    tokens = torch.arange(16 * 64 + 1)
    config = replace(CONFIG, plan=((64, 4),), rows=4)
    read = [training_batch(tokens, config, step, row)[0] for step in range(4) for row in range(4)]
    assert torch.equal(torch.cat(read, 1)[0].sort()[0], torch.arange(16 * 64)) and config.tokens == 16 * 64
    single = replace(CONFIG, plan=((64, 16),))
    assert all(torch.equal(x, training_batch(tokens, single, i)[0]) for i, x in enumerate(read))
    assert learning_rate(config, 3) == learning_rate(replace(config, rows=1), 3)


def test_a_run_in_copies_on_two_processes(words, tmp_path):
    "Two processes that share the two sequences of each step, and one that takes both."
    flags = ["--steps", "4", "--text", str(words), "--dtype", "float32", "--rows", "2", "--clip", "1.0", *SIZE]
    for size in (1, 2):
        found = spawn_gloo(command_worker, size, [*flags, "--out", str(tmp_path), "--name", f"run{size}"])
        assert found == [0] * size
    one, two = (losses(tmp_path / f"run{size}") for size in (1, 2))
    assert len(one) == 4 and one == pytest.approx(two, rel=5e-3)  # Muon orthogonalizes in bfloat16
    rows = read_metrics(tmp_path / "run2")
    assert rows[-1]["bytes"] == 2 * sum(row["context"] for row in rows)
    assert LongNet.from_pretrained(tmp_path / "run2").config == load_run(tmp_path / "run1")[1].model


def command_worker(rank, world, flags):
    return command.demo([*flags, "--data-parallel", str(world)])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--data-parallel 2", "torchrun --nproc-per-node 2 -m dilated_attention_nb.training --data-parallel 2"),
        ("--rows 0", "rows must be"),
        ("--clip 0", "clip must be"),
        ("--clip nan", "clip must be"),
        ("--data-parallel 0", "data_parallel must be"),
    ],
)
def test_flags_of_copies_are_checked(flags, says, words, tmp_path, capsys):
    assert command.demo([*flags.split(), "--text", str(words), "--out", str(tmp_path / "runs"), *SIZE]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_what_copies_cannot_share_is_refused():
    for values, says in (
        ({"rows": 3, "data_parallel": 2}, "rows must be a multiple of data_parallel 2"),
        ({"rows": 2, "data_parallel": 2, "sequence_parallel": 2}, "be 1 where sequences are cut"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(CONFIG, **values)


def test_resuming_takes_no_other_flags(capsys):
    with pytest.raises(SystemExit) as end:
        command.demo(["--resume", "x", "--seed", "0"])
    assert end.value.code == 2 and "leave out --seed" in capsys.readouterr().err


# ---- text ------------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(min_size=1), st.integers(1, 10**6), min_size=1, max_size=100))
def test_held_out_files_depend_on_names_and_sizes_alone(sizes):
    held = held_out(sizes)
    assert held == held_out(dict(sorted(sizes.items(), reverse=True)))
    assert held <= sizes.keys() and sum(sizes[name] for name in held) <= sum(sizes.values()) / 16
    assert len(held) < len(sizes)


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=10))
def test_tokens_hold_all_bytes(parts):
    tokens = to_tokens(parts)
    assert to_bytes(tokens) == b"".join(parts) and int((tokens == SEPARATOR).sum()) == len(parts)


def test_no_held_out_line_is_trained_on(tmp_path):
    for i in range(100):
        (tmp_path / f"f{i}").write_text(f"only in {i:05}\n" * 50)
    corpus = read_corpus(str(tmp_path))
    lines = [set(to_bytes(stream).split(b"\n")) - {b""} for stream in (corpus.train, corpus.held)]
    assert lines[0].isdisjoint(lines[1]) and len(lines[0] | lines[1]) == 100
    assert {f"only in {int(name[1:]):05}".encode() for name in corpus.held_files} == lines[1]


def test_copies_of_a_held_out_file_are_not_trained_on(tmp_path):
    for i in range(60):
        (tmp_path / f"f{i}").write_text(f"only in {i % 30:05}\n" * 50)  # each twice
    corpus = read_corpus(str(tmp_path))
    lines = [set(to_bytes(stream).split(b"\n")) - {b""} for stream in (corpus.train, corpus.held)]
    assert lines[1] and lines[0].isdisjoint(lines[1]) and len(lines[0] | lines[1]) == 30
    only = [file for file in tmp_path.iterdir() if int(file.name[1:]) % 30]
    for file in only:
        file.unlink()
    corpus = read_corpus(str(tmp_path))  # two copies of one file are one file
    assert corpus.held_files == () and to_bytes(corpus.train) + to_bytes(corpus.held) in (
        b"only in 00000\n" * 50,
        b"only in 00000\n" * 100,
    )
    for i in range(40):
        (tmp_path / f"g{i}").write_text("only in 00000\n" * 50)
    corpus = read_corpus(str(tmp_path))
    assert corpus.held_files == () and to_bytes(corpus.train) + to_bytes(corpus.held) == b"only in 00000\n" * 50


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_are_no_text(words, tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    os.mkfifo(tmp_path / "pipe")
    assert text_files(tmp_path) == [tmp_path / "a.txt"]


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_links_to_nothing_or_to_folders_are_passed_over_and_counted(words, tmp_path, capsys):
    for path in words.iterdir():
        (tmp_path / path.name).symlink_to(path)
    plain = read_corpus(str(tmp_path))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    corpus = read_corpus(str(tmp_path))
    assert (corpus.dangling, corpus.copies) == (2, 0) and corpus.digest == plain.digest
    assert "2 links to nothing or to folders were left out" in corpus.left_out and plain.left_out == ""
    (tmp_path / "elsewhere").symlink_to(words)  # may lead in circles, and isn't followed
    assert text_files(tmp_path, links=(links := [])) and len(links) == read_corpus(str(tmp_path)).dangling == 3
    (tmp_path / "only").mkdir()
    (tmp_path / "only/gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="0 files in .*, and 1 links to nothing or to folders"):
        read_corpus(str(tmp_path / "only"))


def test_a_text_of_copies_says_that_they_were_left_out(tmp_path, capsys):
    for i in range(40):
        (tmp_path / f"f{i}").write_text("ab")
    assert command.demo(["--text", str(tmp_path), "--steps", "2", "--out", str(tmp_path / "runs"), *SIZE]) == 2
    said = capsys.readouterr().err
    assert "got 3 bytes" in said or "got 2 bytes" in said
    assert "after 39 copies of held-out files were left out" in said


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_names_that_are_no_utf8(tmp_path):
    for i in range(40):
        name = os.path.join(os.fsencode(tmp_path), b"\xff%d.txt" % i)
        try:
            Path(os.fsdecode(name)).write_text(f"text {i} " * 100)
        except OSError:
            pytest.skip("this file system wants UTF-8")
    assert len(read_corpus(str(tmp_path)).train_files) > 30


@pytest.mark.parametrize("files", [1, 2, 3])
def test_few_files_have_their_end_held_out(files, tmp_path):
    for i in range(files):
        (tmp_path / f"{i}.txt").write_bytes(bytes([65 + i]) * 8000)
    corpus = read_corpus(str(tmp_path))
    assert corpus.held_files == () and len(corpus.train_files) == files
    assert to_bytes(corpus.train) + to_bytes(corpus.held) == b"".join(bytes([65 + i]) * 8000 for i in range(files))
    assert len(corpus.held) == pytest.approx(8000 * files / 16, rel=0.01)
    only = read_corpus(str(tmp_path / "0.txt"))
    assert to_bytes(only.train) + to_bytes(only.held) == b"A" * 8000


def test_files_are_found_in_order_without_tests_and_hidden_ones(tmp_path):
    for name in ("b.py", "a/z.py", "a/test/x.py", ".git/y.py", "a.py", "c.txt", "a/.h.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in text_files(tmp_path, ".py", SKIPPED)]
    assert found == ["a.py", "a/z.py", "b.py"]
    assert len(text_files(tmp_path)) == 5  # a folder of the user's, as it is


# ---- the loop's arithmetic -------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.sampled_from([16, 256, 1000, 16_384]))
def test_a_plan_of_steps_has_that_many(steps, context):
    plan = plan_of_steps(steps, context)
    assert sum(n for _, n in plan) == steps and plan[-1][0] == context and all(n >= 0 for _, n in plan)
    assert [stage_of(plan, step)[0] for step in range(steps)] == [w for w, n in plan for _ in range(n)]


@given(st.floats(0.001, 10), st.floats(10, 1000))
def test_a_plan_of_time_fills_it(second, budget):
    seconds = [second, 2 * second, 8 * second]
    plan = make_plan(seconds, budget, 16_384)
    taken = sum(n * s for (_, n), s in zip(plan, seconds))
    assert abs(taken - budget) <= max(seconds) * 3


def test_each_window_comes_once_per_epoch():
    tokens = torch.arange(10 * 64 + 1)
    config = replace(CONFIG, plan=((64, 20),))
    starts = [int(training_batch(tokens, config, step)[0][0, 0]) for step in range(20)]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 640, 64)) and starts[:10] != starts[10:]
    other = [int(training_batch(tokens, replace(config, seed=1), step)[0][0, 0]) for step in range(10)]
    assert other != starts[:10]


def test_the_rate_rises_and_falls_to_almost_zero():
    config = replace(CONFIG, plan=((64, 300), (256, 50)))
    rates = [learning_rate(config, step) for step in range(350)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.02 and max(rates) > 0.9


@pytest.mark.parametrize("context", [1, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 256)), 1000])
def test_bits_per_byte_is_the_mean_surprise(context):
    model = make_model(CONFIG).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    tokens = to_tokens([bytes(range(50, 200)), b"another", b"third " * 30])
    bits = 0.0
    for at in range(1, len(tokens)):
        first = (at - 1) // context * context
        with torch.no_grad():
            logits = model(tokens[None, first:at].long())[0, -1]
        bits -= logits.log_softmax(-1)[int(tokens[at])].item() / math.log(2)
    found = bits_per_byte(model, CONFIG, tokens, context)
    assert found == pytest.approx(bits / len(to_bytes(tokens)), rel=1e-9)


def test_ngram_rows_depend_on_the_last_tokens_alone():
    embedding = NgramEmbedding(VOCAB, 8, (2, 4), 1 << 20)
    tokens = torch.randint(0, VOCAB, (3, 40))
    for length, rows in zip((2, 4), embedding.hashes(tokens)):
        assert rows.min() >= 0 and rows.max() < 1 << 20
        assert torch.equal(rows[:, 10], [*embedding.hashes(tokens[:, 11 - length : 11])][(2, 4).index(length)][:, -1])
        grams = {
            tuple(t.tolist()): int(r)
            for t, r in zip(tokens.unfold(1, length, 1).flatten(0, 1), rows[:, length - 1 :].flatten())
        }
        assert len(set(grams.values())) >= len(grams) - 1
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % VOCAB
    same = (embedding(tokens) == embedding(changed)).all(-1)
    assert same[:, :20].all() and same[:, 24:].all() and not same[:, 20].any()


def test_the_model_with_ngrams_is_causal():
    model = make_model(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    a = torch.randint(0, VOCAB, (1, 200))
    b = a.clone()
    b[:, 120] = (b[:, 120] + 1) % VOCAB
    same = (model(a) == model(b)).all(-1)[0]
    assert same[:120].all() and not same[120]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", [0, 1, 5, 6, 9])
def test_resuming_in_memory_is_exact(cut, dtype, tmp_path):
    config = replace(CONFIG, dtype=dtype, model=replace(TINY, dropout=0.1))
    tokens = to_tokens([bytes(i * i % 251 for i in range(4000))])

    def fresh(seed):
        model = make_model(replace(config, seed=seed))
        return model, make_optimizers(model, config)

    model, optimizers = fresh(0)
    whole = [train_step(model, optimizers, config, tokens, step) for step in range(10)]
    model, optimizers = fresh(0)
    parts = [train_step(model, optimizers, config, tokens, step) for step in range(cut)]
    save_checkpoint(tmp_path / "c", config, model, optimizers, cut)
    model, optimizers = fresh(5)
    torch.rand(7)
    begin = load_checkpoint(tmp_path / "c", config, model, optimizers)
    parts += [train_step(model, optimizers, config, tokens, step) for step in range(begin, 10)]
    assert parts == whole


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_file(tmp_path / "a", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_samples_are_repeatable_and_follow_the_seed():
    model, prompt = make_model(CONFIG), to_tokens([b"a prompt"])
    samples = [sample_tokens(model, CONFIG, prompt, 30, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    assert (sample_tokens(model, CONFIG, prompt, 5, temperature=1e-6) < VOCAB).all()


def test_a_loss_that_is_not_finite_stops_the_run(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "train_step", lambda *_: float("nan"))
    assert command.demo(["--text", str(words), "--steps", "2", "--out", str(tmp_path), *SIZE]) == 2
    assert "loss must stay finite, got nan at step 0" in capsys.readouterr().err
