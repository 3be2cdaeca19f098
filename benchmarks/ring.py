"""Measure the ring and store the figures in benchmarks/ring.json.

    python benchmarks/ring.py                    all sections (some five minutes on two cores)
    python benchmarks/ring.py memory trace       some of them
    python benchmarks/ring.py --check memory     store nothing; say what is worse than what is stored

All ranks are processes on this machine, one thread each, joined by gloo over the loopback device: four of them on two
cores show who waits for whom and how much is held and sent, not how fast four devices would be.
block_sparse_ring.py measures with the same `peak` and `events`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dilated_attention_nb.benchmarks import environment, in_turn, medians, run_sections, show_rows

RESULTS = Path(__file__).with_name("ring.json")
RANKS = 4


def origin() -> dict[str, Any]:
    "Where a section was measured: every rank has one thread."
    return environment() | {"threads": 1}


def make(kind: str, options: dict[str, Any]) -> Any:
    "A layer of attention: of one process, or of a ring."
    from dilated_attention_nb import block_sparse, config, improved, ring_block_sparse, ring_dilated

    kinds: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "dilated": (improved.ImprovedDilatedAttention, config.DilatedAttentionConfig),
        "ring": (ring_dilated.RingDilatedAttention, ring_dilated.RingAttentionConfig),
        "block_sparse": (block_sparse.BlockSparseAttention, ring_block_sparse.BlockSparseRingConfig),
        "block_sparse_ring": (
            ring_block_sparse.BlockSparseRingDilatedAttention,
            ring_block_sparse.BlockSparseRingConfig,
        ),
    }
    build, configure = kinds[kind]
    return build(configure(**options))


def held(rank: int, world: int, kind: str, options: dict[str, Any], n: int, dtype: torch.dtype) -> int:
    "Bytes at the worst moment of a forward and backward pass, beyond what the process held before its inputs."
    from dilated_attention_nb.processes import resident

    attend = make(kind, options)

    def step(m: int) -> None:
        q, k, v = (torch.randn(1, m, 8, 64, dtype=dtype).requires_grad_() for _ in range(3))
        attend(q, k, v, is_causal=True).backward(torch.randn(1, m, 8, 64, dtype=dtype))

    step(128)  # connections and threads
    before = resident("VmRSS")
    step(n // world)
    return resident("VmHWM") - before


def peak(ranks: int, kind: str, options: dict[str, Any], n: int, dtype: torch.dtype = torch.float32) -> float:
    "MiB that the fullest of some ranks holds, each with its share of n tokens."
    import ring  # this file, under a name that another process can import

    from dilated_attention_nb.processes import spawn_gloo

    return max(spawn_gloo(ring.held, ranks, kind, options, n, dtype, timeout_s=1800.0)) / 2**20


def traced(rank: int, world: int, kind: str, options: dict[str, Any], n: int) -> list[str]:
    "What this rank did in a causal forward pass, after one to warm up: see `LINE`."
    import torch.distributed as dist

    layer = make(kind, options)
    q, k, v = (torch.randn(1, n // world, 4, 64) for _ in range(3))
    with torch.no_grad():
        layer(q, k, v, True)
        dist.barrier()
        begin = time.perf_counter()
        layer.record = []
        layer(q, k, v, True)
    times = [(e, e.begin - begin, e.end - begin) for e in layer.record if e.kind != "receive"]
    return [f"{rank} {e.step} {e.kind} {e.block[1]} {e.block[2]} {a:.6f} {b:.6f}" for e, a, b in times]


LINE = "rank, step, what, chunk of the queries (send: to which rank), {} of the keys, seconds from and to"


def events(kind: str, options: dict[str, Any], n: int) -> list[str]:
    "What all ranks did, a line for each event."
    import ring

    from dilated_attention_nb.processes import spawn_gloo

    found = spawn_gloo(ring.traced, RANKS, kind, options, n, timeout_s=1800.0)
    return [line for lines in found for line in lines]


def timed(rank: int, world: int, cases: dict[str, dict[str, Any]], shape: tuple[int, ...], repeats: int) -> Any:
    "Median seconds of a forward and backward pass of each case, taken in turn, until the slowest rank is done."
    import torch.distributed as dist

    b, n, h, d = shape
    x = [torch.randn(b, n // world, h, d).requires_grad_() for _ in range(3)]
    dout = torch.randn(b, n // world, h, d)

    def step(layer: Any) -> None:
        torch.autograd.grad(layer(*x, True), x, dout)
        dist.barrier()  # so that all begin together, too

    layers = {name: make("ring", case) for name, case in cases.items()}
    dist.barrier()
    return medians(in_turn({name: lambda y=layer: step(y) for name, layer in layers.items()}, repeats))


def strategy() -> dict[str, Any]:
    "From neighbour to neighbour against all at once."
    import ring

    from dilated_attention_nb.processes import spawn_gloo

    n, how = 8192, {"mixing": "softmax", "offsets": "interleaved", "layout": "zigzag"}

    def rows() -> Iterator[dict[str, Any]]:
        for r in (1, 2, 4, 8, 16, 64):
            branch = {"segment_lengths": (n,), "dilation_rates": (r,)}
            cases = {name: branch | how | {"strategy": name} for name in ("ring", "gather")}
            seconds = spawn_gloo(ring.timed, RANKS, cases, (1, n, 4, 64), 7, timeout_s=1800.0)[0]
            row = {"w": n, "r": r, "sparse_rows": n // r, "tokens_per_rank": n // RANKS}
            row |= {f"{name}_ms": s * 1e3 for name, s in seconds.items()}
            yield row | {"ratio": seconds["ring"] / seconds["gather"]}

    about = {"n": n, "heads": 4, "head_dim": 64, "ranks": RANKS, "dtype": "float32", "causal": True}
    return about | {"layout": "zigzag", "what": "forward+backward", "rows": show_rows(rows())}


LENGTHS, RATES = (2048, 32_768, 65_536), (1, 8, 16)


def memory() -> dict[str, Any]:
    "Memory per rank against one process."
    n = 65_536
    branches = {"segment_lengths": LENGTHS, "dilation_rates": RATES, "mixing": "softmax", "ragged": "mask"}
    cases: list[tuple[int, dict[str, Any]]] = [(1, {}), (2, {})]
    cases += [(RANKS, {"strategy": s, "layout": x}) for s in ("ring", "gather") for x in ("contiguous", "zigzag")]

    def rows() -> Iterator[dict[str, Any]]:
        for dtype in (torch.float32, torch.bfloat16):
            first = 0.0
            for ranks, options in cases:
                mib = peak(ranks, "ring" if ranks > 1 else "dilated", branches | options, n, dtype)
                first = first or mib
                yield {"dtype": str(dtype)[6:], "ranks": ranks, **options, "peak_mib": mib, "ratio": mib / first}

    about = {"n": n, "heads": 8, "head_dim": 64, "causal": True, "mixing": "softmax"}
    about |= {"segment_lengths": LENGTHS, "dilation_rates": RATES, "what": "forward+backward"}
    return about | {"rows": show_rows(rows())}


def trace() -> dict[str, Any]:
    "Who computes, sends and waits when: a causal segment over all ranks."
    n, layouts = 8192, ("contiguous", "zigzag")
    branch = {"segment_lengths": (n,), "dilation_rates": (1,), "strategy": "ring"}
    about = {"n": n, "heads": 4, "head_dim": 64, "ranks": RANKS, "dtype": "float32", "line": LINE.format("chunk")}
    return about | {"events": {layout: events("ring", branch | {"layout": layout}, n) for layout in layouts}}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"strategy": strategy, "memory": memory, "trace": trace}


if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS, origin=origin))
