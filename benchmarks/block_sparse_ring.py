"""Measure the block-sparse ring and store the figures in benchmarks/block_sparse_ring.json.

    python benchmarks/block_sparse_ring.py           all sections (some two minutes on two cores)
    python benchmarks/block_sparse_ring.py trace     one of them

All ranks are processes on this machine, one thread each, joined by gloo over the loopback device, as in ring.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dilated_attention_nb.benchmarks import environment

RESULTS = Path(__file__).with_name("block_sparse_ring.json")
RANKS = 4


def held(rank: int, world: int, n: int, options: dict[str, Any]) -> int:
    "Bytes at the worst moment of a forward and backward pass, beyond what the process held before its inputs."
    from dilated_attention_nb.block_sparse import BlockSparseAttention
    from dilated_attention_nb.block_sparse_ring import BlockSparseRingDilatedAttention
    from dilated_attention_nb.config import BlockSparseRingConfig
    from dilated_attention_nb.testing import _resident

    config = BlockSparseRingConfig((n,), (1,), **options)
    attend: Any = BlockSparseAttention(config) if world == 1 else BlockSparseRingDilatedAttention(config)

    def step(m: int) -> None:
        q, k, v = (torch.randn(1, m, 8, 64).requires_grad_() for _ in range(3))
        attend(q, k, v, is_causal=True).backward(torch.randn(1, m, 8, 64))

    step(128)  # connections and threads
    before = _resident("VmRSS")
    step(n // world)
    return _resident("VmHWM") - before


def memory() -> dict[str, Any]:
    "Memory per rank against one process."
    import block_sparse_ring  # this file, under a name that another process can import

    from dilated_attention_nb.testing import spawn_gloo

    n, rows = 65_536, []
    for pattern in ("local_window", "global_local", "random"):
        first = None
        cases: list[tuple[int, dict[str, Any]]] = [(1, {}), (2, {})]
        cases += [(RANKS, {"strategy": s}) for s in ("auto", "ring")]
        for ranks, how in cases:
            options = {"pattern_type": pattern, "sparsity_ratio": 0.0625, **how}
            peak = max(spawn_gloo(block_sparse_ring.held, ranks, n, options, timeout_s=1800.0)) / 2**20
            first = first or peak
            rows.append({"pattern": pattern, "ranks": ranks, **how, "peak_mib": peak, "ratio": peak / first})
            print(rows[-1], flush=True)
    about = {"n": n, "heads": 8, "head_dim": 64, "causal": True, "dtype": "float32", "threads": 1, "block_size": 128}
    return about | {"sparsity_ratio": 0.0625, "what": "forward+backward", "rows": rows}


def traced(rank: int, world: int, n: int, pattern: str) -> list[str]:
    "What this rank did in a forward pass, after one to warm up: see `trace`."
    import torch.distributed as dist

    from dilated_attention_nb.block_sparse_ring import BlockSparseRingDilatedAttention
    from dilated_attention_nb.config import BlockSparseRingConfig

    options = {"pattern_type": pattern, "sparsity_ratio": 0.125, "strategy": "ring"}
    layer = BlockSparseRingDilatedAttention(BlockSparseRingConfig((n,), (1,), **options))
    q, k, v = (torch.randn(1, n // world, 4, 64) for _ in range(3))
    with torch.no_grad():
        layer(q, k, v, True)
        dist.barrier()
        begin = time.perf_counter()
        layer.record = []
        layer(q, k, v, True)
    times = [(e, e.begin - begin, e.end - begin) for e in layer.record if e.kind != "receive"]
    return [f"{rank} {e.step} {e.kind} {e.block[1]} {e.block[2]} {a:.6f} {b:.6f}" for e, a, b in times]


def trace() -> dict[str, Any]:
    "Who computes, sends and waits when."
    import block_sparse_ring

    from dilated_attention_nb.testing import spawn_gloo

    n, events = 16_384, {}
    for pattern in ("local_window", "random"):
        found = spawn_gloo(block_sparse_ring.traced, RANKS, n, pattern, timeout_s=1800.0)
        events[pattern] = [line for lines in found for line in lines]
    about = {"n": n, "heads": 4, "head_dim": 64, "ranks": RANKS, "dtype": "float32", "threads": 1, "block_size": 128}
    line = "rank, step, what, chunk of the queries (send: to which rank), rank of the keys, seconds from and to"
    return about | {"sparsity_ratio": 0.125, "causal": True, "line": line, "events": events}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"memory": memory, "trace": trace}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS) + "; none: all")
    chosen = parser.parse_args().sections or list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in chosen:
        print(f"{name} ...", flush=True)
        result = environment() | SECTIONS[name]()
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(stored | {name: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
