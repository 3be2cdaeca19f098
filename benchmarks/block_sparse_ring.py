"""Measure the block-sparse ring and store the figures in benchmarks/block_sparse_ring.json.

    python benchmarks/block_sparse_ring.py                    all sections (some two minutes on two cores)
    python benchmarks/block_sparse_ring.py trace              one of them
    python benchmarks/block_sparse_ring.py --check memory     store nothing; say what is worse than what is stored

All ranks are processes on this machine, one thread each, joined by gloo over the loopback device, as in ring.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ring import LINE, RANKS, events, origin, peak

from dilated_attention_nb.benchmarks import run_sections, show_rows

RESULTS = Path(__file__).with_name("block_sparse_ring.json")


def memory() -> dict[str, Any]:
    "Memory per rank against one process."
    n, density = 65_536, 0.0625
    cases: list[tuple[int, dict[str, Any]]] = [(1, {}), (2, {}), *((RANKS, {"strategy": s}) for s in ("auto", "ring"))]

    def rows() -> Iterator[dict[str, Any]]:
        for pattern in ("local_window", "global_local", "random"):
            first, blocks = 0.0, {"pattern_type": pattern, "sparsity_ratio": density}
            for ranks, how in cases:
                kind = "block_sparse_ring" if ranks > 1 else "block_sparse"
                mib = peak(ranks, kind, {"segment_lengths": (n,), "dilation_rates": (1,), **blocks, **how}, n)
                first = first or mib
                yield {"pattern": pattern, "ranks": ranks, **how, "peak_mib": mib, "ratio": mib / first}

    about = {"n": n, "heads": 8, "head_dim": 64, "causal": True, "dtype": "float32", "block_size": 128}
    return about | {"sparsity_ratio": density, "what": "forward+backward", "rows": show_rows(rows())}


def trace() -> dict[str, Any]:
    "Who computes, sends and waits when."
    n, density = 16_384, 0.125
    options = {"segment_lengths": (n,), "dilation_rates": (1,), "sparsity_ratio": density, "strategy": "ring"}
    found = {p: events("block_sparse_ring", options | {"pattern_type": p}, n) for p in ("local_window", "random")}
    about = {"n": n, "heads": 4, "head_dim": 64, "ranks": RANKS, "dtype": "float32", "block_size": 128}
    return about | {"sparsity_ratio": density, "causal": True, "line": LINE.format("rank"), "events": found}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"memory": memory, "trace": trace}


if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS, origin=origin))
