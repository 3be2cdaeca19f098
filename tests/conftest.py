"""Settings that every test shares: threads, seeds, hypothesis; and how `make test` takes a part of a long test.

`make test` (`-m "not slow"`) draws a fifth of hypothesis' examples and takes of a product of parameters as many as
hold every pair of values. `make test-slow`, and pytest without `-m`, draw all examples and run the whole product.
"""

import itertools
import math
import os
import signal
import sys
from contextlib import contextmanager

# Before torch is imported: two threads at most, so that a test means the same on a laptop and on a server. One where
# tests run side by side (pytest -n): threads that wait for a core in a loop take it from those that work. What the
# caller asked for stays, in workers too, which inherit what this file set in the process that started them.
os.environ.setdefault("TEST_THREADS", os.environ.get("OMP_NUM_THREADS", ""))
os.environ["OMP_NUM_THREADS"] = os.environ["TEST_THREADS"] or (
    "1" if "PYTEST_XDIST_WORKER" in os.environ else str(min(2, os.cpu_count() or 1))
)
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler tells stderr when it starts and stops

import hypothesis
import pytest
import torch

# Triton decides when it is imported (which torch does when it compiles): without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Signals that a parent lets its children ignore (nohup, `make test &` in a script) are what tests of signals are about.
for name, handler in {
    "SIGHUP": signal.SIG_DFL,
    "SIGINT": signal.default_int_handler,
    "SIGTERM": signal.SIG_DFL,
}.items():
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)

# The same examples in every run; no deadline, as a busy machine is no fault. HYPOTHESIS_PROFILE=explore looks further.
for name, count in {"quick": 20, "repeatable": 100, "explore": 1000}.items():
    hypothesis.settings.register_profile(
        name, derandomize=name != "explore", deadline=None, max_examples=count, print_blob=True
    )
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    "Before the tests are collected, and so before `drawn` is called."
    usual = "quick" if "not slow" in config.option.markexpr else "repeatable"
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", usual))


def drawn(examples: int) -> hypothesis.settings:
    "For a test that draws more or fewer examples than usual: that many of 100, and the same share in other profiles."
    return hypothesis.settings(max_examples=math.ceil(examples * hypothesis.settings.default.max_examples / 100))


def covering(axes: list[list]) -> set[tuple[int, ...]]:
    "Places in the product of `axes` that hold every pair of values of two axes, about as few as can be found quickly."
    sizes = [range(len(axis)) for axis in axes]
    missing = {
        ((i, a), (j, b))
        for (i, first), (j, second) in itertools.combinations(enumerate(sizes), 2)
        for a, b in itertools.product(first, second)
    }
    rest, chosen = list(itertools.product(*sizes)), set()

    def found(place):
        return missing.intersection(itertools.combinations(enumerate(place), 2))

    while missing:
        best = max(rest, key=lambda place: len(found(place)))  # the first of the best: the same in every run
        missing -= found(best)
        chosen.add(best)
    return chosen


def product(ids=None, **axes):
    "Parametrise by the product of `axes`. What is beyond those that hold every pair of values is marked slow."
    values = [list(axis) for axis in axes.values()]
    quick = covering(values)
    cases = [
        pytest.param(*(axis[i] for axis, i in zip(values, place)), marks=() if place in quick else pytest.mark.slow)
        for place in itertools.product(*(range(len(axis)) for axis in values))
    ]
    return pytest.mark.parametrize(tuple(axes), cases, ids=ids)


@contextmanager
def planned():
    "Within, or in a test that it decorates, `dilated_attention` follows its plan also where one dense call would do."
    from dilated_attention_nb import improved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(improved, "one_call", lambda *_: None)
        yield


def peak_of_tensors(fn, *args) -> int:
    "The most bytes of memory for tensors that `fn(*args)` held at once on the CPU: counted, so the same in every run."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn(*args)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.fixture(autouse=True)
def same_start():
    "Each test begins with the same seed, threads and float32 and without figures, whatever ran before."
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_default_dtype(torch.float32)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    yield
