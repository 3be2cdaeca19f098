"""Functions in processes of their own. Workers find functions at the top of this file only."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from dilated_attention_nb.processes import demo_failure, demo_fill, demo_ring, peak_memory, spawn_gloo


def sleep_forever():
    time.sleep(3600)


def report(rank, world_size, extra):
    return rank, world_size, os.getpid(), torch.distributed.get_rank(), torch.distributed.get_backend(), extra


def write_pid_and_fail(rank, world_size, folder):
    Path(folder, str(rank)).write_text(str(os.getpid()))
    torch.distributed.barrier()
    demo_failure(rank, world_size, "raise")


def unpicklable(rank, world_size):
    return lambda: None


def leave_early(rank, world_size):
    if rank == 0:
        sys.exit(0)
    torch.distributed.barrier()


def test_peak_memory():
    small, large = (peak_memory(demo_fill, size * 2**20) for size in (8, 160))
    assert small.before > 2**20 and 7 * 2**20 < small.extra < 60 * 2**20
    assert abs(large.extra - small.extra - 152 * 2**20) < 20 * 2**20


def test_peak_memory_of_a_failing_function():
    with pytest.raises(RuntimeError, match=r"process 0 of 1 failed: (?s:.*)negative dimension"):
        peak_memory(demo_fill, -1)
    with pytest.raises(ValueError, match="importable module, got .*<lambda>"):
        peak_memory(lambda: None)
    for timeout_s in (8, 80, 800):
        with pytest.raises(TimeoutError, match=rf"process \[0\] of 1 not done after {timeout_s}") as error:
            peak_memory(sleep_forever, timeout_s=timeout_s)
        if "sleep_forever" in str(error.value):
            return
    raise error.value


def test_ranks_return_in_order():
    results = spawn_gloo(report, 3, {"x": torch.arange(3)})
    assert [r[0] for r in results] == [r[3] for r in results] == [0, 1, 2]
    assert len({r[2] for r in results} | {os.getpid()}) == 4  # real processes
    assert all(r[1] == 3 and r[4] == "gloo" and torch.equal(r[5]["x"], torch.arange(3)) for r in results)


def test_one_rank_and_a_ring_of_four():
    assert torch.equal(spawn_gloo(demo_ring, 1, torch.ones(2))[0], torch.ones(2))
    assert all(torch.equal(x, torch.full((2,), 10.0)) for x in spawn_gloo(demo_ring, 4, torch.ones(2)))


def test_a_workers_exception_arrives_and_nobody_is_left(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed: Traceback.*something is wrong in rank 1"):
        spawn_gloo(write_pid_and_fail, 2, str(tmp_path))
    for rank in "01":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / rank).read_text()), 0)


def test_a_dead_worker_is_detected():
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 died: exit code 3"):
        spawn_gloo(demo_failure, 2, "die", timeout_s=1e6)


def test_a_hanging_worker_is_ended():
    for timeout_s in (8, 80, 800):  # on a busy machine it takes a while until both are where they hang
        with pytest.raises(TimeoutError, match=rf"rank \[0, 1\] of 2 not done after {timeout_s}") as error:
            spawn_gloo(demo_failure, 2, "hang", timeout_s=timeout_s)
        if re.search(r"(?s)rank 1: .*demo_failure", str(error.value)):
            return
    raise error.value


@pytest.mark.parametrize(
    ("fn", "words"), [(unpicklable, "rank [01] of 2 died: (?s:.*)pickle"), (leave_early, "rank 0 .*SystemExit")]
)
def test_odd_endings(fn, words):
    with pytest.raises(RuntimeError, match=f"(?s){words}"):
        spawn_gloo(fn, 2)


def test_functions_must_be_importable():
    def local(rank, world_size):
        return rank

    for fn in (local, lambda rank, world_size: rank):
        with pytest.raises(ValueError, match="must be a function of an importable module"):
            spawn_gloo(fn, 2)
    with pytest.raises(ValueError, match="world_size"):
        spawn_gloo(demo_ring, 0, torch.ones(1))
