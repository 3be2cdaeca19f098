"""Measure when a pool beats the allocator and store the figures in benchmarks/memory_pool.json.

    python benchmarks/memory_pool.py                all sections (some two minutes on two cores)
    python benchmarks/memory_pool.py sizes          some of them

Every figure is a ratio of medians of runs that alternate within one process.
"""

from __future__ import annotations

import resource
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dilated_attention_nb import improved
from dilated_attention_nb.benchmarks import environment, in_turn, medians, run_sections
from dilated_attention_nb.memory_pool import MemoryPoolConfig, UnifiedMemoryPool

RESULTS = Path(__file__).with_name("memory_pool.json")


def conditions() -> dict[str, Any]:
    "Where a section was measured, and how the system hands out large pages."
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    text = huge.read_text() if huge.exists() else "[unknown]"
    return environment() | {"dtype": "uint8", "huge_pages": text[text.index("[") + 1 : text.index("]")]}


def fresh(nbytes: int, count: int, write: bool) -> None:
    "Some buffers at a time from the allocator, written or not, and freed."
    buffers = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(count)]
    for buffer in buffers if write else ():
        buffer.fill_(1)


def pooled(pool: UnifiedMemoryPool, nbytes: int, count: int, write: bool) -> None:
    "The same from the pool."
    buffers = [pool.get_buffer((nbytes,), torch.uint8) for _ in range(count)]
    for buffer in buffers if write else ():
        buffer.fill_(1)
    for buffer in buffers:
        pool.return_buffer(buffer)


def sizes() -> dict[str, Any]:
    "One buffer or four at a time, from 4 KiB to 256 MiB."
    rows: list[dict[str, Any]] = []
    for use, count, write in (("not written", 1, False), ("written", 1, True), ("four at once, written", 4, True)):
        for power in range(12, 29, 2):
            nbytes, pool = 2**power, UnifiedMemoryPool(MemoryPoolConfig(max_bytes=2**31))
            times = max(1, min(200, 2**24 // (nbytes * count)))

            def repeat(run: Callable[..., None], *args: Any, times: int = times) -> None:
                for _ in range(times):
                    run(*args)

            runs = {
                "fresh": lambda n=nbytes, c=count, w=write: repeat(fresh, n, c, w),
                "pool": lambda p=pool, n=nbytes, c=count, w=write: repeat(pooled, p, n, c, w),
            }
            seconds = medians(in_turn(runs, 15))
            row = {"use": use, "bytes": nbytes, "speedup": seconds["fresh"] / seconds["pool"]}
            rows.append(row | {f"{name}_us": t / times * 1e6 for name, t in seconds.items()})
            print(rows[-1], flush=True)
    return {"rows": rows}


def pooled_workspace(pool: UnifiedMemoryPool) -> type[improved.Workspace]:
    "The workspace of `dilated_attention`, its buffers from a pool. They are dropped with it, and so come back."

    class PooledWorkspace(improved.Workspace):
        def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            size = torch.Size(shape).numel()
            buffer = self.buffers.get((name, dtype))
            if buffer is None or buffer.numel() < size:
                buffer = self.buffers[name, dtype] = pool.get_buffer((size,), dtype)
            return buffer[:size].view(shape)

    return PooledWorkspace


def page_faults(run: Callable[[], None], times: int = 5) -> float:
    "Pages that the system maps in one run; it has run before."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times


LENGTHS, RATES = (2048, 4096, 8192), (1, 2, 4)


def one_workspace(dtype: str, n: int) -> dict[str, float]:
    "Forward passes with either workspace, in a process of its own: what `malloc` keeps depends on what came before."
    own, lengths = improved.Workspace, [w for w in LENGTHS if w <= n]
    q, k, v = (torch.randn(1, n, 8, 64).to(getattr(torch, dtype)) for _ in range(3))
    pool = UnifiedMemoryPool(MemoryPoolConfig(max_bytes=2**31))
    lent = pooled_workspace(pool)

    def run(kind: type[improved.Workspace]) -> None:
        improved.Workspace = kind  # type: ignore[misc]
        try:
            with torch.no_grad():
                improved.dilated_attention(q, k, v, lengths, RATES[: len(lengths)], is_causal=True, mixing="softmax")
        finally:
            improved.Workspace = own  # type: ignore[misc]

    runs = {"fresh": lambda: run(own), "pool": lambda: run(lent)}
    seconds = medians(in_turn(runs, 7))
    found = {f"{name}_ms": t * 1e3 for name, t in seconds.items()}
    found |= {f"{name}_faults": page_faults(one) for name, one in runs.items()}
    return found | {"hit_rate": pool.get_stats()["hit_rate"], "peak_bytes": pool.get_stats()["peak_bytes"]}


def workspace() -> dict[str, Any]:
    "`dilated_attention` without gradients, its workspace from the allocator or from a pool; three processes each."
    rows = []
    for dtype, n in (("float32", 2048), ("float32", 8192), ("bfloat16", 8192)):
        found = []
        for _ in range(3):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                found.append(process.submit(one_workspace, dtype, n).result())
        ratios = sorted(one["fresh_ms"] / one["pool_ms"] for one in found)
        row = {"dtype": dtype, "n": n, "speedup": ratios[1], "speedups": ratios}
        rows.append(row | {name: statistics.median(one[name] for one in found) for name in found[0]})
        print(rows[-1], flush=True)
    about = {"heads": 8, "head_dim": 64, "causal": True, "mixing": "softmax"}
    return about | {"segment_lengths": LENGTHS, "dilation_rates": RATES, "rows": rows}


def threads() -> dict[str, Any]:
    "Microseconds for one loan of 64 bytes when several threads share a pool, or each asks the allocator."
    rows = []
    for count in (1, 2, 8, 32):
        pool = UnifiedMemoryPool(MemoryPoolConfig(max_bytes=2**20))
        loans = 3200 // count

        def together(work: Callable[[], None], count: int = count, loans: int = loans) -> None:
            def many() -> None:
                for _ in range(loans):
                    work()

            running = [threading.Thread(target=many) for _ in range(count)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()

        runs = {
            "fresh": lambda f=together: f(lambda: fresh(64, 1, False)),
            "pool": lambda f=together, p=pool: f(lambda: pooled(p, 64, 1, False)),
        }
        seconds = medians(in_turn(runs))
        row = {"pool_threads": count, "speedup": seconds["fresh"] / seconds["pool"]}
        rows.append(row | {f"{name}_us": t / (loans * count) * 1e6 for name, t in seconds.items()})
        print(rows[-1], flush=True)
    return {"rows": rows, "loan_us": statistics.median(row["pool_us"] for row in rows)}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"sizes": sizes, "workspace": workspace, "threads": threads}


if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS, origin=conditions))
