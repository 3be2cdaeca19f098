"""`python -m dilated_attention_nb`: says what is here, and that its check can fail."""

import re
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

import dilated_attention_nb
import dilated_attention_nb.__main__ as module
from dilated_attention_nb import available_backends, dilated_attention

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    "As from a shell, or after some lines of Python."
    code = f"{before}\nimport runpy, sys\nsys.argv = ['x', *{arguments!r}]\n"
    command = ["-c", code + "runpy.run_module('dilated_attention_nb', run_name='__main__')"] if before else []
    return subprocess.run(
        [sys.executable, *(command or ["-m", "dilated_attention_nb", *arguments])], capture_output=True, text=True
    )


def test_it_says_what_is_here():
    done = run("--device", "cpu")
    said = {line[:21].strip(): line[22:] for line in done.stdout.splitlines()}
    assert done.returncode == 0 and not done.stderr
    assert said["dilated-attention-nb"].startswith(dilated_attention_nb.__version__ + ",")
    assert said["torch"] == torch.__version__ and said["device"].startswith("cpu, ")
    for name, reason in available_backends("cpu", torch.bfloat16).items():
        assert said[f"backend {name}"].startswith(f"not available: {reason}" if reason else "available")
    taken = [name for name, line in said.items() if line.endswith('"auto" takes')]
    assert taken == ["backend flash"]
    assert re.fullmatch(r"[\d.]+ s, in which PyTorch loads code that it needs once", said["first call"])
    share = re.fullmatch(
        r"passed in [\d.]+ s(?:, more than the usual second)?: ([\w, ]+); "
        r"forward and backward at most ([\d.]+) of the error allowed",
        said["self-check"],
    )
    assert share and share[1] == "auto, flash, math" and 0 < float(share[2]) <= 1


def test_what_is_not_installed_is_missed():
    hidden = "import sys; sys.modules['transformers'] = sys.modules['triton'] = None"
    done = run("--device", "cpu", before=hidden)
    assert done.returncode == 0, done.stderr
    for name in ("transformers", "triton"):
        words = f"extra {name:15} not available: the package {name} is not installed: pip install '"
        assert f"{words}dilated-attention-nb[{name}]'" in done.stdout
    assert re.search(r"backend triton +not available: the package triton is not installed", done.stdout)


def test_a_failed_check_says_by_how_much_and_sets_the_status(monkeypatch, capsys):
    def scaled(q, k, v, *branches, **options):
        return dilated_attention(q, k, v, *branches, scale=1.01 * q.shape[3] ** -0.5, **options)

    monkeypatch.setattr(module, "dilated_attention", scaled)
    assert module.main(["--device", "cpu"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"self-check +FAILED, float32, groups: out\[.*error \S+ is \S+ times the \S+ allowed", last)


def test_what_a_first_call_loads_is_timed_before_the_check(monkeypatch, capsys):
    slept, called = 0.6, []

    def first(*x, **options):
        if not called:
            time.sleep(slept)
        called.append(options)
        return dilated_attention(*x, **options)

    monkeypatch.setattr(module, "dilated_attention", first)
    assert module.main(["--device", "cpu"]) == 0
    before, last = capsys.readouterr().out.splitlines()[-2:]
    assert float(re.match(r"first call +([\d.]+) s", before)[1]) >= slept
    assert len(called) > 12 and all(options["backend"] for options in called), "the checks are no first call"
    assert re.match(r"self-check +passed in ", last)


def test_every_backend_that_is_here_is_checked(monkeypatch, capsys):
    def wrong(*x, backend, **options):
        return dilated_attention(*x, backend=backend, **options) * (1.01 if backend == "math" else 1)

    monkeypatch.setattr(module, "dilated_attention", wrong)
    assert module.main(["--device", "cpu"]) == 1
    assert re.search(r"FAILED, float32, groups: out\[.*\(backend math\)$", capsys.readouterr().out.splitlines()[-1])
    assert not module.self_check(CPU, "cudnn"), "which takes no dtype here"


def test_the_gradient_is_checked_too(monkeypatch):
    def detached(q, k, v, *branches, **options):
        return dilated_attention(q, k.detach(), v, *branches, **options)

    monkeypatch.setattr(module, "dilated_attention", detached)
    with pytest.raises(AssertionError, match=r"^float32, groups: dk\["):
        module.self_check(CPU)


@pytest.mark.parametrize(
    ("device", "words"), [("tpu9", "device must name a device, got 'tpu9'"), ("meta", "device meta can't be used")]
)
def test_a_device_that_is_not_here(device, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(["--device", device])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and words in said.err and not said.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        module.main(["--device", "cuda"])
    assert "device cuda can't be used: " in capsys.readouterr().err


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def test_every_extra_of_the_settings_is_looked_for():
    "Apart from what is for work on the library, and with the version that the settings ask for."
    values, tools = settings(), {"nbdev", "docs", "dev"}
    keys = [key.removesuffix("_requirements") for key in values if key.endswith("_requirements")]
    assert {key.replace("_", "-") for key in keys} - tools == set(module.EXTRAS)
    for extra in module.EXTRAS:
        wanted = values[f"{extra.replace('-', '_')}_requirements"]
        name, least = re.match(r"([\w-]+)>=([\d.]+)", wanted).groups()
        lines = [f"other>=9; extra == '{extra}'", f'{wanted.replace(";", "; ")} and extra == "{extra}"']
        assert (name, module.oldest(extra, lines)) == (extra, least)


@pytest.mark.parametrize(
    ("version", "words"), [(None, "is not installed"), ("5.9", "5.9 is older than 5.23"), ("5.23.0", None), ("6", None)]
)
def test_versions_of_extras(version, words):
    said = module.extra_obstacle("transformers", version, "5.23")
    assert said is None if words is None else words in said and "[transformers]'" in said
