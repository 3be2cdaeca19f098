"""Measure the ring and store the figures in benchmarks/ring.json.

    python benchmarks/ring.py                    all sections (some five minutes on two cores)
    python benchmarks/ring.py memory trace       some of them
    python benchmarks/ring.py --check memory     store nothing; say what is worse than what is stored

All ranks are processes on this machine, one thread each, joined by gloo over the loopback device: four of them on two
cores show who waits for whom and how much is held and sent, not how fast four devices would be.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dilated_attention_nb.benchmarks import run_sections

RESULTS = Path(__file__).with_name("ring.json")
RANKS = 4


def timed(rank: int, world: int, cases: list[dict[str, Any]], shape: tuple[int, ...], repeats: int) -> list[float]:
    "Seconds of a forward and backward pass of each case, taken in turn, the slowest rank's; one round of warm-up."
    import torch.distributed as dist

    from dilated_attention_nb.config import RingAttentionConfig
    from dilated_attention_nb.ring import RingDilatedAttention

    b, n, h, d = shape
    q, k, v, dout = (torch.randn(b, n // world, h, d) for _ in range(4))
    layers = [RingDilatedAttention(RingAttentionConfig(**case)) for case in cases]
    seconds: list[list[float]] = [[] for _ in cases]
    for round_ in range(repeats + 1):
        for layer, found in zip(layers, seconds):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            dist.barrier()
            begin = time.perf_counter()
            torch.autograd.grad(layer(*leaves, True), leaves, dout)
            taken = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if round_:
                found.append(float(taken))
    return [statistics.median(found) for found in seconds]


def strategy() -> dict[str, Any]:
    "From neighbour to neighbour against all at once."
    import ring  # this file, under a name that another process can import

    from dilated_attention_nb.testing import spawn_gloo

    n, rows = 8192, []
    names = ("ring", "gather")
    for r in (1, 2, 4, 8, 16, 64):
        cases = [
            {"segment_lengths": (n,), "dilation_rates": (r,), "mixing": "softmax", "offsets": "interleaved",
             "layout": "zigzag", "strategy": name}
            for name in names
        ]  # fmt: skip
        seconds = spawn_gloo(ring.timed, RANKS, cases, (1, n, 4, 64), 7, timeout_s=1800.0)[0]
        rows.append({"w": n, "r": r, "sparse_rows": n // r, "tokens_per_rank": n // RANKS})
        rows[-1] |= {f"{name}_ms": s * 1e3 for name, s in zip(names, seconds)}
        print(rows[-1], flush=True)
    about = {"n": n, "heads": 4, "head_dim": 64, "ranks": RANKS, "dtype": "float32", "causal": True, "threads": 1}
    return about | {"layout": "zigzag", "what": "forward+backward", "rows": rows}


LENGTHS, RATES = (2048, 32_768, 65_536), (1, 8, 16)


def held(rank: int, world: int, n: int, dtype: torch.dtype, options: dict[str, Any]) -> int:
    "Bytes at the worst moment of a forward and backward pass, beyond what the process held before its inputs."
    from dilated_attention_nb.config import RingAttentionConfig
    from dilated_attention_nb.improved import dilated_attention
    from dilated_attention_nb.ring import RingDilatedAttention
    from dilated_attention_nb.testing import _resident

    def step(attend: Callable[..., torch.Tensor], m: int) -> None:
        q, k, v = (torch.randn(1, m, 8, 64, dtype=dtype).requires_grad_() for _ in range(3))
        attend(q, k, v, is_causal=True).backward(torch.randn(1, m, 8, 64, dtype=dtype))

    def alone(*x: torch.Tensor, is_causal: bool) -> torch.Tensor:
        return dilated_attention(*x, LENGTHS, RATES, mixing="softmax", ragged="mask", is_causal=is_causal)

    attend: Any = alone
    if world > 1:
        attend = RingDilatedAttention(RingAttentionConfig(LENGTHS, RATES, mixing="softmax", ragged="mask", **options))
    step(attend, 64 * world)  # connections and threads
    before = _resident("VmRSS")
    step(attend, n // world)
    return _resident("VmHWM") - before


def memory() -> dict[str, Any]:
    "Memory per rank against one process."
    import ring

    from dilated_attention_nb.testing import spawn_gloo

    n, rows = 65_536, []
    for dtype in (torch.float32, torch.bfloat16):
        cases: list[tuple[int, dict[str, Any]]] = [(1, {}), (2, {})]
        cases += [
            (RANKS, {"strategy": s, "layout": layout})
            for s in ("ring", "gather")
            for layout in ("contiguous", "zigzag")
        ]
        for ranks, options in cases:
            peak = max(spawn_gloo(ring.held, ranks, n, dtype, options, timeout_s=1800.0))
            row = {"dtype": str(dtype)[6:], "ranks": ranks, **options, "peak_mib": peak / 2**20}
            first = next((r for r in rows if r["dtype"] == row["dtype"]), row)
            rows.append(row | {"ratio": peak / 2**20 / first["peak_mib"]})
            print(rows[-1], flush=True)
    about = {"n": n, "heads": 8, "head_dim": 64, "causal": True, "mixing": "softmax", "threads": 1}
    return about | {"segment_lengths": LENGTHS, "dilation_rates": RATES, "what": "forward+backward", "rows": rows}


def traced(rank: int, world: int, n: int, layout: str) -> list[str]:
    "What this rank did in a forward pass, after one to warm up: see `trace`."
    import torch.distributed as dist

    from dilated_attention_nb.config import RingAttentionConfig
    from dilated_attention_nb.ring import RingDilatedAttention

    layer = RingDilatedAttention(RingAttentionConfig((n,), (1,), layout=layout, strategy="ring"))
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
    "Who computes, sends and waits when: a causal segment over all ranks."
    import ring

    from dilated_attention_nb.testing import spawn_gloo

    n, events = 8192, {}
    for layout in ("contiguous", "zigzag"):
        events[layout] = [
            line for lines in spawn_gloo(ring.traced, RANKS, n, layout, timeout_s=1800.0) for line in lines
        ]
    about = {"n": n, "heads": 4, "head_dim": 64, "ranks": RANKS, "dtype": "float32", "threads": 1}
    line = "rank, step, what, chunk of the queries (send: to which rank), chunk of the keys, seconds from and to"
    return about | {"line": line, "events": events}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"strategy": strategy, "memory": memory, "trace": trace}


if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS))
