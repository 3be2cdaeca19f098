"""Measure the core layers and store the figures in benchmarks/core.json.

    python benchmarks/core.py                   all sections (about half an hour on two cores)
    python benchmarks/core.py floor dense       some of them
    python benchmarks/core.py --check floor     store nothing; say what is worse than what is stored

Every ratio compares runs that alternate within one process, so that a busy machine slows both sides.
Each section keeps its own device, threads, versions and date: sections measured at different times stand side by side.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dilated_attention_nb.benchmarks import in_turn, medians, ratio, run_sections

RESULTS = Path(__file__).with_name("core.json")


def causal_mask() -> dict[str, Any]:
    "A loop over pairs against one comparison."
    from dilated_attention_nb.masking import causal_mask as vectorised

    def looped(n: int) -> torch.Tensor:
        mask = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            for j in range(n):
                if j <= i:
                    mask[i, j] = True
        return mask

    rows = []
    for n in (128, 256, 512, 1024):
        assert torch.equal(looped(n), vectorised(n, n))
        runs = {"loop": lambda n=n: looped(n), "vectorised": lambda n=n: vectorised(n, n)}
        seconds = in_turn(runs, 3)
        row = {"n": n} | {f"{name}_ms": t * 1e3 for name, t in medians(seconds).items()}
        rows.append(row | {"speedup": ratio(seconds, "loop", "vectorised")})
    return {"rows": rows}


N, H, D = 16_384, 8, 64
LENGTHS, RATES = (2048, 4096, 8192, 16_384), (1, 2, 4, 8)


def gathered(x: torch.Tensor, mixing: str) -> list[torch.Tensor]:
    "What each branch attends to, copied beforehand: `[segments, heads, w / r, d]`, tokens before heads in memory."
    from dilated_attention_nb.masking import branch_heads

    found = []
    for g, (w, r) in enumerate(zip(LENGTHS, RATES)):
        segments = x.unflatten(1, (x.shape[1] // w, w)).flatten(0, 1)
        parts = [segments[:, s::r, list(heads)] for heads, s in branch_heads(x.shape[2], g, RATES, mixing)]
        found.append(torch.cat(parts, 2).contiguous().transpose(1, 2))
    return found


def floor() -> dict[str, Any]:
    "`dilated_attention` against the bare kernel calls on tensors that were gathered beforehand."
    from dilated_attention_nb.improved import dilated_attention

    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for mixing in ("softmax", "groups"):
            for causal in (True, False):
                q, k, v, dout = (torch.randn(1, N, H, D).to(dtype) for _ in range(4))
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                parts = [gathered(x, mixing) for x in (q, k, v, dout)]
                kept = [forward(a, b, c, 0.0, causal) for a, b, c, _ in zip(*parts)]

                def bare_forward(parts: Any = parts, causal: bool = causal) -> None:
                    for a, b, c, _ in zip(*parts):
                        forward(a, b, c, 0.0, causal)

                def bare_both(parts: Any = parts, kept: Any = kept, causal: bool = causal) -> None:
                    for (a, b, c, g), (out, lse) in zip(zip(*parts), kept):
                        forward(a, b, c, 0.0, causal)
                        backward(g, a, b, c, out, lse, 0.0, causal)

                def ours(x: Any = (q, k, v), causal: bool = causal, mixing: str = mixing) -> torch.Tensor:
                    return dilated_attention(*x, LENGTHS, RATES, is_causal=causal, mixing=mixing)

                def ours_both(x: Any = leaves, dout: Any = dout, causal: bool = causal, mixing: str = mixing) -> None:
                    torch.autograd.grad(ours(x, causal, mixing), x, dout)

                for what, runs in (("forward", (ours, bare_forward)), ("forward+backward", (ours_both, bare_both))):
                    t = in_turn(dict(zip(("ours", "floor"), runs)), 21 if what == "forward" else 9)
                    row = {"dtype": str(dtype)[6:], "mixing": mixing, "causal": causal, "what": what}
                    row["ratio"] = ratio(t, "ours", "floor")
                    row |= {f"{name}_ms": value * 1e3 for name, value in medians(t).items()}
                    rows.append(row)
                    print(row, flush=True)
    return {"n": N, "heads": H, "head_dim": D, "segment_lengths": LENGTHS, "dilation_rates": RATES, "rows": rows}


def processor_time(runs: dict[str, Callable[[], Any]], repeats: int, calls: int) -> dict[str, list[float]]:
    "Seconds of the processor a call, for runs that alternate within this process."
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.process_time()
            for _ in range(calls):
                run()
            seconds[name].append((time.process_time() - begin) / calls)
    return seconds


def small() -> dict[str, Any]:
    "Calls of 64 tokens, float32, one thread, against one dense `scaled_dot_product_attention`: time of the processor."
    from dilated_attention_nb.improved import dilated_attention

    lengths, rates, rows = (8, 16, 32, 64), (1, 2, 4, 8), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    q, k, v, dout = (torch.randn(1, 64, H, D) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for mixing in ("softmax", "groups"):
        for causal in (True, False):

            def ours(x: Any = (q, k, v), mixing: str = mixing, causal: bool = causal) -> torch.Tensor:
                return dilated_attention(*x, lengths, rates, is_causal=causal, mixing=mixing)

            def theirs(x: Any = (q, k, v), causal: bool = causal) -> torch.Tensor:
                swapped = (y.transpose(1, 2) for y in x)
                return torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=causal).transpose(1, 2)

            for what in ("forward", "forward+backward"):
                runs: dict[str, Callable[[], Any]] = {
                    name: (lambda f=f: torch.autograd.grad(f(leaves), leaves, dout)) if what != "forward" else f
                    for name, f in (("dilated", ours), ("dense", theirs))
                }
                seconds = processor_time(runs, 31, 20 if what == "forward" else 10)
                row = {"mixing": mixing, "causal": causal, "what": what, "ratio": ratio(seconds, "dilated", "dense")}
                rows.append(row | {f"{name}_us": t * 1e6 for name, t in medians(seconds).items()})
                print(rows[-1], flush=True)
    torch.set_num_threads(threads)
    about = {"n": 64, "heads": H, "head_dim": D, "dtype": "float32", "threads_used": 1, "clock": "processor"}
    return about | {"segment_lengths": lengths, "dilation_rates": rates, "rows": rows}


def dense() -> dict[str, Any]:
    "`dilated_attention` against dense `scaled_dot_product_attention`, causal bfloat16."
    from dilated_attention_nb.improved import dilated_attention

    rows = []
    for n in (16_384, 32_768, 65_536):
        q, k, v, dout = (torch.randn(1, n, H, D).bfloat16() for _ in range(4))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]

        def ours(x: Any = leaves) -> torch.Tensor:
            return dilated_attention(*x, LENGTHS, RATES, is_causal=True, mixing="softmax")

        def theirs(x: Any = leaves) -> torch.Tensor:
            swapped = (y.transpose(1, 2) for y in x)
            return torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=True).transpose(1, 2)

        for what in ("forward", "forward+backward"):
            both = what != "forward"
            runs: dict[str, Callable[[], Any]] = {
                name: (lambda f=f, x=leaves, g=dout: torch.autograd.grad(f(x), x, g))
                if both
                else (lambda f=f, x=(q, k, v): f(x))
                for name, f in (("dilated", ours), ("dense", theirs))
            }
            seconds = in_turn(runs, 3)
            row = {"n": n, "what": what, "speedup": ratio(seconds, "dense", "dilated")}
            rows.append(row | {f"{name}_ms": t * 1e3 for name, t in medians(seconds).items()})
            print(rows[-1], flush=True)
    about = {"heads": H, "head_dim": D, "dtype": "bfloat16", "causal": True, "mixing": "softmax"}
    return about | {"segment_lengths": LENGTHS, "dilation_rates": RATES, "rows": rows}


def long_run(n: int, backward: bool, seconds: str) -> None:
    "One run at length n, for a process of its own; its seconds by the clock and of the processor go to the file."
    from dilated_attention_nb.improved import dilated_attention

    def inputs(n: int) -> list[torch.Tensor]:
        return [torch.randn(1, n, H, D, dtype=torch.bfloat16).requires_grad_(backward) for _ in range(3)]

    out = dilated_attention(*inputs(N), LENGTHS, RATES, is_causal=True, mixing="softmax")  # loads what is loaded once
    if backward:
        out.sum().backward()
    q, k, v = inputs(n)
    dout = torch.randn(1, n, H, D, dtype=torch.bfloat16) if backward else None
    begin = time.perf_counter(), time.process_time()
    out = dilated_attention(q, k, v, LENGTHS, RATES, is_causal=True, mixing="softmax")
    if backward:
        out.backward(dout)
    Path(seconds).write_text(f"{time.perf_counter() - begin[0]} {time.process_time() - begin[1]}")


def million() -> dict[str, Any]:
    """Up to a million tokens in one process: time per token, and the peak of the process's memory.

    A run takes a minute or two, long enough for others on the machine to get in its way: the processor's seconds, which
    they lengthen little, stand beside those of the clock.
    """
    import core  # this file, under a name that another process can import

    from dilated_attention_nb.processes import peak_memory

    rows: list[dict[str, Any]] = []
    for backward in (False, True):
        runs: dict[int, list[tuple[float, float, int]]] = {131_072: [], 1_048_576: []}
        for _ in range(1 if backward else 3):
            for n, found in runs.items():
                with tempfile.TemporaryDirectory() as folder:
                    file = f"{folder}/seconds"
                    peak = peak_memory(core.long_run, n, backward, file, timeout_s=1800).peak
                    clock, processor = map(float, Path(file).read_text().split())
                    found.append((clock, processor, peak))
        for n, found in runs.items():
            clocks, processors, peaks = zip(*found)
            seconds, cpu_seconds = statistics.median(clocks), statistics.median(processors)
            row: dict[str, Any] = {"n": n, "what": "forward+backward" if backward else "forward", "runs": len(found)}
            row |= {"seconds": seconds, "cpu_seconds": cpu_seconds, "us_per_token": seconds / n * 1e6}
            row |= {"peak_gib": max(peaks) / 2**30, "per_token_ratio": 1.0, "cpu_per_token_ratio": 1.0}
            if n > 131_072:
                short = rows[-1]
                row["per_token_ratio"] = seconds / n / (short["seconds"] / short["n"])
                row["cpu_per_token_ratio"] = cpu_seconds / n / (short["cpu_seconds"] / short["n"])
            rows.append(row)
            print(row, flush=True)
    about = {"heads": H, "head_dim": D, "dtype": "bfloat16", "causal": True, "mixing": "softmax"}
    return about | {"segment_lengths": LENGTHS, "dilation_rates": RATES, "rows": rows}


PACKED = (  # documents, shortest, longest, heads, head_dim, segment lengths, dilation rates
    (1000, 1, 64, 4, 16, (16, 64), (1, 4)),
    (1000, 1, 64, 12, 64, (16, 64), (1, 4)),
    (1000, 16, 256, 4, 16, (16, 64), (1, 4)),
    (1000, 16, 256, 8, 32, (64, 256, 1024), (1, 2, 4)),
    (100, 500, 1500, 4, 16, (64, 256, 1024), (1, 2, 4)),
)


def packed() -> dict[str, Any]:
    "Packed documents of random lengths against their tokens in one sequence: float32, time of the processor."
    from dilated_attention_nb.improved import dilated_attention

    rows = []
    for documents, low, high, heads, d, ws, rs in PACKED:
        lengths = torch.randint(low, high + 1, (documents,), generator=torch.Generator().manual_seed(0))
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        leaves = [torch.randn(1, int(ends[-1]), heads, d, requires_grad=True) for _ in range(3)]
        about = {"documents": documents, "shortest": low, "longest": high, "heads": heads, "head_dim": d}
        for mixing in ("softmax", "groups"):
            for causal in (True, False):

                def run(
                    cu: Any, x: Any = leaves, ws: Any = ws, rs: Any = rs, mixing: Any = mixing, c: bool = causal
                ) -> Any:
                    return dilated_attention(*x, ws, rs, is_causal=c, mixing=mixing, ragged="mask", cu_seqlens=cu)

                def both(cu: Any, run: Any = run, x: Any = leaves) -> None:
                    torch.autograd.grad(run(cu), x, x[0].detach())

                for what, f in (("forward", torch.no_grad()(run)), ("forward+backward", both)):
                    runs = {"packed": lambda f=f, ends=ends: f(ends), "one": lambda f=f: f(None)}
                    seconds = in_turn(runs, 5, clock=time.process_time)
                    row = about | {"segment_lengths": ws, "dilation_rates": rs, "mixing": mixing, "causal": causal}
                    row |= {"what": what, "ratio": ratio(seconds, "packed", "one")}
                    rows.append(row | {f"{name}_ms": t * 1e3 for name, t in medians(seconds).items()})
                    print(rows[-1], flush=True)
    return {"rows": rows}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "causal_mask": causal_mask,
    "floor": floor,
    "small": small,
    "dense": dense,
    "million": million,
    "packed": packed,
}


if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS))
