"""Measure the fused Triton kernels on an NVIDIA GPU and store the figures in benchmarks/gpu.json.

    python benchmarks/gpu.py                 all sections
    python benchmarks/gpu.py floor dense     some of them
    python benchmarks/gpu.py --rehearse      every section at toy size, in Triton's interpreter; stores nothing

The goals, on a GPU of the H100 class: 0.85 times the throughput of bundled FlashAttention on tensors that were gathered
beforehand, forward and forward+backward (`floor`); 15 times faster than dense flash at 131,072 tokens, 12 heads of 64,
causal, forward (`dense`); 16 million tokens forward on one GPU of 141 GB (`long`). The sections
sizes_forward, sizes_queries and sizes_keys time other sizes of blocks, each within ten minutes: what there was no time
for is named.

Ratios compare runs that alternate within one process. Without CUDA the script says so and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # for --rehearse, before Triton is imported

from dilated_attention_nb import benchmarks  # noqa: E402
from dilated_attention_nb.benchmarks import in_turn, run_sections  # noqa: E402

RESULTS = Path(__file__).with_name("gpu.json")
LENGTHS, RATES = (2048, 4096, 8192, 16_384, 32_768), (1, 2, 4, 8, 16)
SIZES = {"n": 131_072, "heads": 12, "long": [2**20, 2**22, 2**24], "repeats": 15, "seconds": 480}
GOALS = {"floor": 0.85, "dense": 15.0}
DEVICE = torch.device("cuda" if CUDA else "cpu")
Run = Callable[[], Any]


def rehearsal() -> None:
    "Toy sizes, so that the script can be tried where there is no GPU."
    global LENGTHS, RATES
    LENGTHS, RATES = (32, 64), (1, 2)
    SIZES.update(n=64, heads=2, long=[64], repeats=1)


def environment() -> dict[str, Any]:
    "Where a section was measured."
    about = benchmarks.environment(DEVICE.type) | {"triton": importlib.metadata.version("triton")}
    if not CUDA:
        return about | {"device": "cpu, Triton's interpreter: times mean nothing"}
    found = torch.cuda.get_device_properties(0)
    about |= {"memory_gib": found.total_memory / 2**30, "cuda": torch.version.cuda}
    return about | {"capability": f"{found.major}.{found.minor}"}


def alternate(runs: dict[str, Run], repeats: int | None = None) -> dict[str, list[float]]:
    "Milliseconds of each run, taken in turn, after rounds of warm-up (compilation among them), by the device's clock."
    seconds = in_turn(runs, repeats or SIZES["repeats"], DEVICE.type)
    return {name: [1e3 * s for s in found] for name, found in seconds.items()}


def normal(n: int, heads: int, d: int, dtype: torch.dtype, count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(1, n, heads, d, dtype=dtype, device=DEVICE) for _ in range(count)]


def pairs(n: int, heads: int, mixing: str, causal: bool) -> int:
    "Query-key pairs of a layer."
    from dilated_attention_nb.masking import tiles

    plan = tiles(n, n, heads, heads, LENGTHS, RATES, mixing)
    sizes = [(t.segments * t.num_heads, t.size[0], t.size[1]) for t in plan]
    return sum(many * (rows * (rows + 1) // 2 if causal else rows * keys) for many, rows, keys in sizes)


def gathered(x: torch.Tensor, mixing: str) -> list[torch.Tensor]:
    "What each branch attends to, copied beforehand: `[segments, heads, w / r, d]`, contiguous."
    from dilated_attention_nb.improved import Workspace, gather, sides
    from dilated_attention_nb.masking import tiles

    plan = tiles(x.shape[1], x.shape[1], x.shape[2], x.shape[2], LENGTHS, RATES, mixing)
    return [gather(Workspace(x.device), "x", x, sides(tile)[0], True).transpose(1, 2).contiguous() for tile in plan]


def floor() -> dict[str, Any]:
    "The fused kernels, and the layer on bundled kernels, against bare flash calls on gathered tensors."
    from dilated_attention_nb.backends import KERNELS
    from dilated_attention_nb.improved import dilated_attention

    flash, rows, n, heads = KERNELS["flash"], [], SIZES["n"], SIZES["heads"]
    for d, dtype in ((64, torch.bfloat16), (64, torch.float16), (128, torch.bfloat16)):
        for mixing in ("softmax", "groups"):
            for causal in (True, False):
                q, k, v, dout = normal(n, heads, d, dtype, 4)
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                parts = list(zip(*(gathered(x, mixing) for x in (q, k, v, dout))))
                kept = [flash.forward(a, b, c, None, causal, d**-0.5) for a, b, c, _ in parts]

                def bare(both: bool, parts: Any = parts, kept: Any = kept, causal: bool = causal, d: int = d) -> None:
                    for (a, b, c, g), (out, lse) in zip(parts, kept):
                        flash.forward(a, b, c, None, causal, d**-0.5)
                        if both:
                            flash.backward(g, a, b, c, out, lse, None, causal, d**-0.5)

                def layer(
                    both: bool, backend: str, how: Any = (mixing, causal), x: Any = leaves, g: Any = dout
                ) -> None:
                    inputs = x if both else [y.detach() for y in x]
                    options = dict(mixing=how[0], is_causal=how[1], backend=backend)
                    out = dilated_attention(*inputs, LENGTHS, RATES, **options)
                    if both:
                        torch.autograd.grad(out, inputs, g)

                for what in ("forward", "forward+backward"):
                    both = what != "forward"
                    runs = {"floor": lambda f=bare, both=both: f(both)}
                    for backend in ("triton", "flash"):
                        runs[backend] = lambda f=layer, both=both, backend=backend: f(both, backend)
                    t = alternate(runs)
                    flops = pairs(n, heads, mixing, causal) * 4 * d * (3.5 if both else 1)
                    case = {"d": d, "dtype": str(dtype)[6:], "mixing": mixing, "causal": causal, "what": what}
                    ms = {name: statistics.median(x) for name, x in t.items()}
                    for name in ("triton", "flash"):
                        ratio = statistics.median(a / b for a, b in zip(t["floor"], t[name]))
                        row = case | {"backend": name, "throughput_ratio": ratio, "ms": ms[name]}
                        row |= {"floor_ms": ms["floor"], "tflops": flops / ms[name] / 1e9}
                        rows.append(row | {"floor_tflops": flops / ms["floor"] / 1e9})
                        print(rows[-1], flush=True)
    met = all(row["throughput_ratio"] >= GOALS["floor"] for row in rows if row["backend"] == "triton")
    return {"n": n, "heads": heads, "segment_lengths": LENGTHS, "dilation_rates": RATES, "goal_met": met, "rows": rows}


def dense() -> dict[str, Any]:
    "The fused kernel against dense flash, causal, forward."
    from dilated_attention_nb.backends import KERNELS
    from dilated_attention_nb.improved import dilated_attention

    n, heads, d = SIZES["n"], SIZES["heads"], 64
    q, k, v = normal(n, heads, d, torch.bfloat16)
    options = dict(is_causal=True, mixing="softmax")
    swapped = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    runs: dict[str, Run] = {
        name: lambda name=name: dilated_attention(q, k, v, LENGTHS, RATES, backend=name, **options)
        for name in ("triton", "flash")
    }
    runs["dense"] = lambda: KERNELS["flash"].forward(*swapped, None, True, d**-0.5)
    t = alternate(runs, min(SIZES["repeats"], 7))
    speedup = {name: statistics.median(a / b for a, b in zip(t["dense"], t[name])) for name in ("triton", "flash")}
    about = {"n": n, "heads": heads, "d": d, "dtype": "bfloat16", "segment_lengths": LENGTHS, "dilation_rates": RATES}
    rows = [{"backend": name, "ms": statistics.median(t[name]), "speedup": speedup[name]} for name in speedup]
    dense_ms = statistics.median(t["dense"])
    return about | {"dense_ms": dense_ms, "goal_met": speedup["triton"] >= GOALS["dense"], "rows": rows}


def long() -> dict[str, Any]:
    "A forward pass of up to 16 million tokens: q, k, v, out and lse are all that is ever allocated."
    from dilated_attention_nb.improved import dilated_attention

    rows, heads, d = [], SIZES["heads"], 64
    for n in SIZES["long"]:
        need = n * heads * (4 * d * 2 + 4)
        free = torch.cuda.mem_get_info()[0] if CUDA else 2 * need
        row: dict[str, Any] = {"n": n, "needs_gib": need / 2**30}
        if need > 0.98 * free:
            rows.append(row | {"left_out": f"needs {need / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free"})
            print(rows[-1], flush=True)
            continue
        q, k, v = normal(n, heads, d, torch.bfloat16)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        how: dict[str, Any] = dict(is_causal=True, mixing="softmax", backend="triton")
        run = {"ours": lambda x=(q, k, v), how=how: dilated_attention(*x, LENGTHS, RATES, **how)}
        t = statistics.median(alternate(run, 3)["ours"])
        row |= {"ms": t, "us_per_token": t / n * 1e3}
        rows.append(row | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None})
        print(rows[-1], flush=True)
        del q, k, v, run
        if CUDA:
            torch.cuda.empty_cache()
    met = True if "ms" in rows[-1] else None  # neither met nor missed where the GPU is too small
    return {"heads": heads, "d": d, "dtype": "bfloat16", "causal": True, "goal_met": met, "rows": rows}


def sizes(kernel: str) -> dict[str, Any]:
    "Other sizes of blocks for a kernel; those of the package come first."
    from triton.errors import TritonError

    from dilated_attention_nb import triton_forward
    from dilated_attention_nb.improved import dilated_attention
    from dilated_attention_nb.triton_forward import Blocks

    chosen, rows, end = triton_forward._blocks, [], time.monotonic() + SIZES["seconds"]
    n, heads = min(SIZES["n"], 65_536), SIZES["heads"]
    tried = [Blocks(own, step, warps, stages) for own in (64, 128) for step in (32, 64, 128) for warps in (4, 8)
             for stages in (2, 3)]  # fmt: skip
    cases: dict[int, tuple[list[torch.Tensor], torch.Tensor]] = {}
    for d in (64, 128):
        leaves = [x.requires_grad_() for x in normal(n, heads, d, torch.bfloat16)]
        cases[d] = leaves, torch.randn_like(leaves[0])

    def run(d: int) -> None:
        leaves, dout = cases[d]
        inputs = leaves if kernel != "forward" else [x.detach() for x in leaves]
        out = dilated_attention(*inputs, LENGTHS, RATES, is_causal=True, mixing="softmax", backend="triton")
        if kernel != "forward":
            torch.autograd.grad(out, inputs, dout)

    wanted = [(d, chosen(kernel, leaves[0])) for d, (leaves, _) in cases.items()]
    wanted += [(d, blocks) for blocks in (tried if CUDA else [Blocks(32, 16, 1, 1)]) for d in cases]
    for d, blocks in wanted:
        row: dict[str, Any] = {"d": d, **vars(blocks)}
        if time.monotonic() > end:
            rows.append(row | {"left_out": f"{SIZES['seconds']} seconds were over"})
            continue
        triton_forward._blocks = lambda name, q, b=blocks: b if name == kernel else chosen(name, q)
        try:
            row["ms"] = statistics.median(alternate({"run": lambda d=d: run(d)}, min(SIZES["repeats"], 5))["run"])
        except (TritonError, RuntimeError) as error:  # too large, or refused by the compiler
            row["left_out"] = f"{type(error).__name__}: {error}"[:200]
        finally:
            triton_forward._blocks = chosen
        rows.append(row)
        print(row, flush=True)
    return {"kernel": kernel, "n": n, "heads": heads, "dtype": "bfloat16", "causal": True, "rows": rows}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"floor": floor, "dense": dense, "long": long}
SECTIONS |= {f"sizes_{kernel}": partial(sizes, kernel) for kernel in ("forward", "queries", "keys")}


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--rehearse", action="store_true")
    own, rest = parser.parse_known_args()
    if not CUDA and not own.rehearse and not {"-h", "--help"} & set(rest):
        print(
            "benchmarks/gpu.py needs an NVIDIA GPU (H100 or H200 for its goals, 110 GB of memory for 16 million tokens)"
        )
        print("and torch for CUDA, which brings Triton. Nothing was measured; --rehearse tries the script at toy size.")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if own.rehearse:
            rehearsal()
        results = Path(folder) / "rehearsal.json" if own.rehearse else RESULTS
        return run_sections(__doc__, results, SECTIONS, rest, environment)


if __name__ == "__main__":
    sys.exit(main())
