"""Measure block-sparse attention and store the figures in benchmarks/block_sparse.json.

    python benchmarks/block_sparse.py                          all sections
    python benchmarks/block_sparse.py generation speed_8k      some of them
    python benchmarks/block_sparse.py --cpu-time speed_8k      one thread and its CPU time: for a machine that is shared
    python benchmarks/block_sparse.py speed_8k_wall            by the wall clock, on all threads: on an idle machine
    python benchmarks/block_sparse.py --only float32,causal speed_32k    some rows, merged with those that are stored
    python benchmarks/block_sparse.py --run runs/longnet error    on a trained demo model
    python benchmarks/block_sparse.py --check speed_8k         store nothing; say what is worse than what is stored

Words of --only: float32, bfloat16, causal, full, forward, forward+backward. Without --run, error is left out.
Every figure is a ratio of medians of runs that alternate within one process. Each section keeps its own device,
threads, versions, date and clock. `x_rho` is the time of the sparse call over that of dense attention, over the density
asked for; `x_density` is the same over the density that the pattern has (rows keep whole blocks). The goals for `x_rho`
are 1.4, for random blocks 1.7 in float32 and 2.4 in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_nb.benchmarks import environment, in_turn, medians, read_results, run_sections

RESULTS = Path(__file__).with_name("block_sparse.json")
H, D, BLOCK = 8, 64, 128
DTYPES = torch.float32, torch.bfloat16
STRUCTURED = ("local_window", "strided", "dilated_sparse")
CLOCK = time.perf_counter
ONLY: set[str] = set()  # words that choose rows of the sections of speed; none: all


def wanted(dtype: torch.dtype, causal: bool, what: str) -> bool:
    "Whether `ONLY` leaves these rows in: for each kind of word, one of those named, or none is."
    kinds = {"float32", "bfloat16"}, {"causal", "full"}, {"forward", "forward+backward"}
    chosen = str(dtype)[6:], "causal" if causal else "full", what
    return all(not ONLY & kind or word in ONLY for kind, word in zip(kinds, chosen))


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    "A section with the rows of both, the newer ones where both have them; each row keeps its date."
    names = ("n", "dtype", "causal", "pattern", "rho", "what")
    rows = {tuple(row.get(name) for name in names): row for row in (*old.get("rows", ()), *new["rows"])}
    return new | {"rows": list(rows.values())}


def kept(name: str, new: dict[str, Any]) -> dict[str, Any]:
    "A section as it is to be stored: with the rows that `--only` left out."
    return merged(read_results(RESULTS).get(name, {}), new) if ONLY else new


def alternate(runs: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    "Median seconds of each run, by the clock that was asked for."
    return medians(in_turn(runs, repeats, clock=CLOCK))


def dense_attention(x: list[Tensor], causal: bool) -> Tensor:
    swapped = (y.transpose(1, 2) for y in x)
    return torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=causal).transpose(1, 2)


def speed(n: int, heads: int, repeats: dict[tuple[torch.dtype, str], int]) -> dict[str, Any]:
    "Sparse attention against dense `scaled_dot_product_attention`."
    from dilated_attention_nb.block_patterns import block_pattern
    from dilated_attention_nb.block_sparse import block_sparse_attention

    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for causal in (False, True):
            what = [w for w in ("forward", "forward+backward") if wanted(dtype, causal, w)]
            if not what:
                continue
            leaves = [torch.randn(1, n, heads, D).to(dtype).requires_grad_() for _ in range(3)]
            plain, dout = [x.detach() for x in leaves], torch.randn(1, n, heads, D).to(dtype)
            patterns = {
                (name, rho): block_pattern(name, n, density=rho, is_causal=causal, num_heads=heads)
                for rho in (0.1, 0.25)
                for name in (*STRUCTURED, "random")
            }
            for which in what:
                both = which != "forward"
                inputs = leaves if both else plain

                def timed(f: Callable[[], Tensor], both: bool = both, x: Any = leaves, g: Any = dout) -> Any:
                    return (lambda: torch.autograd.grad(f(), x, g)) if both else f

                runs = {"dense": timed(lambda x=inputs, c=causal: dense_attention(x, c))}
                for key, pattern in patterns.items():
                    runs[key] = timed(
                        lambda p=pattern, x=inputs, c=causal: block_sparse_attention(*x, p, is_causal=c)  # type: ignore[misc]
                    )
                seconds = alternate(runs, repeats[dtype, which])
                for (name, rho), pattern in patterns.items():
                    ratio, density = seconds[name, rho] / seconds["dense"], pattern.density
                    density = pattern.causal_density if causal else density
                    row = {
                        "n": n,
                        "dtype": str(dtype)[6:],
                        "causal": causal,
                        "pattern": name,
                        "rho": rho,
                        "what": which,
                    }
                    row |= {"x_rho": ratio / rho, "x_density": ratio / density, "density": density, "heads": heads}
                    row |= {"runs": repeats[dtype, which] or 1, "date": environment()["date"]}
                    rows.append(row | {"ms": seconds[name, rho] * 1e3, "dense_ms": seconds["dense"] * 1e3})
                    print(rows[-1], flush=True)
    return {"heads": heads, "head_dim": D, "block_size": BLOCK, "rows": rows}


def thrice() -> dict[tuple[torch.dtype, str], int]:
    return {(dtype, what): 3 for dtype in DTYPES for what in ("forward", "forward+backward")}


def speed_8k() -> dict[str, Any]:
    return kept("speed_8k", speed(8192, H, thrice()))


def speed_32k() -> dict[str, Any]:
    "Two of the eight heads: each head costs the same, and dense attention of all of them takes minutes."
    return kept("speed_32k", speed(32_768, 2, thrice()))


def speed_8k_wall() -> dict[str, Any]:
    "The same as `speed_8k` by the wall clock, on all threads: for a machine that does nothing else."
    return kept("speed_8k_wall", speed(8192, H, thrice()))


def density() -> dict[str, Any]:
    "Time against density, forward, n = 8192, float32."
    from dilated_attention_nb.block_patterns import block_pattern
    from dilated_attention_nb.block_sparse import block_sparse_attention

    n, rows = 8192, []
    x = [torch.randn(1, n, H, D) for _ in range(3)]
    runs: dict[Any, Callable[[], Any]] = {"dense": lambda: dense_attention(x, False)}
    for name in ("local_window", "strided", "random"):
        for rho in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2):
            pattern = block_pattern(name, n, density=rho, num_heads=H)
            runs[name, rho] = lambda p=pattern: block_sparse_attention(*x, p)  # type: ignore[misc]
    seconds = alternate(runs, 3)
    for key, value in seconds.items():
        if key != "dense":
            rows.append({"pattern": key[0], "rho": key[1], "ratio": value / seconds["dense"], "ms": value * 1e3})
    return {
        "n": n,
        "heads": H,
        "head_dim": D,
        "dtype": "float32",
        "causal": False,
        "dense_ms": seconds["dense"] * 1e3,
        "rows": rows,
    }


def flex() -> dict[str, Any]:
    "Inference against compiled FlexAttention with the same mask."
    from dilated_attention_nb.block_patterns import block_pattern
    from dilated_attention_nb.block_sparse import block_sparse_attention

    n, rows = 8192, []
    for dtype in DTYPES:
        x = [torch.randn(1, n, H, D).to(dtype) for _ in range(3)]
        for name in ("local_window", "random"):
            for causal in (False, True):
                pattern = block_pattern(name, n, density=0.25, is_causal=causal, num_heads=H)
                runs: dict[Any, Callable[[], Any]] = {
                    backend: lambda b=backend, p=pattern, c=causal, x=x: block_sparse_attention(
                        *x, p, is_causal=c, backend=b
                    )  # type: ignore[misc]
                    for backend in ("auto", "flex")
                }
                with torch.no_grad():
                    seconds = alternate(runs, 3)
                row = {"n": n, "dtype": str(dtype)[6:], "pattern": name, "causal": causal, "rho": 0.25}
                row |= {
                    "ratio": seconds["auto"] / seconds["flex"],
                    "ms": seconds["auto"] * 1e3,
                    "flex_ms": seconds["flex"] * 1e3,
                }
                rows.append(row)
                print(row, flush=True)
    return {"heads": H, "head_dim": D, "block_size": BLOCK, "rows": rows}


def make_one(name: str, rho: float, causal: bool, seconds: str) -> None:
    "Generate a pattern for a million tokens, in a process of its own; its time goes to the file `seconds`."
    from dilated_attention_nb.block_patterns import block_pattern

    if "thread_time" in seconds:
        torch.set_num_threads(1)
    clock = time.thread_time if "thread_time" in seconds else time.perf_counter
    begin = clock()
    block_pattern(name, 2**20, density=rho, is_causal=causal)
    Path(seconds).write_text(str(clock() - begin))


def generation() -> dict[str, Any]:
    "Every fixed pattern for n = 1,048,576 at block 128: seconds, and what the process's memory grew by at most."
    import block_sparse as this  # this file, under a name that another process can import

    from dilated_attention_nb.block_patterns import SPARSE_PATTERNS
    from dilated_attention_nb.processes import peak_memory

    rows: list[dict[str, Any]] = []
    for name in (p for p in SPARSE_PATTERNS if p != "adaptive"):
        for causal in (False, True):
            found = []
            for _ in range(3):
                with tempfile.TemporaryDirectory() as folder:
                    file = f"{folder}/{'thread_time' if CLOCK is time.thread_time else 'seconds'}"
                    memory = peak_memory(this.make_one, name, 0.25, causal, file, timeout_s=300)
                    found.append((float(Path(file).read_text()), memory.extra))
            row = {"pattern": name, "rho": 0.25, "causal": causal, "seconds": statistics.median(t for t, _ in found)}
            rows.append(row | {"peak_gib": max(m for _, m in found) / 2**30})
            print(rows[-1], flush=True)
    return {"n": 2**20, "block_size": BLOCK, "rows": rows}


def one_pass(n: int, dense: bool) -> None:
    "Forward and backward in a process of its own."
    from dilated_attention_nb.block_patterns import block_pattern
    from dilated_attention_nb.block_sparse import block_sparse_attention

    x = [torch.randn(1, n, 2, D).requires_grad_() for _ in range(3)]
    out = dense_attention(x, True) if dense else None
    if out is None:
        out = block_sparse_attention(*x, block_pattern("random", n, density=2048 / n, is_causal=True), is_causal=True)
    out.sum().backward()


def memory() -> dict[str, Any]:
    "Peak memory of a training step, 16 blocks a row, as the length grows; bytes per token and number of q."
    import block_sparse as this

    from dilated_attention_nb.processes import peak_memory

    rows = []
    for n in (16_384, 32_768, 65_536):
        growth = peak_memory(this.one_pass, n, False, timeout_s=900).extra
        rows.append({"n": n, "mib": growth / 2**20, "times_q": growth / (n * 2 * D * 4)})
        print(rows[-1], flush=True)
    return {"heads": 2, "head_dim": D, "dtype": "float32", "causal": True, "pattern": "random", "rows": rows}


def captured(model: Any, tokens: Tensor) -> list[tuple[Tensor, ...]]:
    "q, k and v of each layer, as its attention gets them."
    found: list[tuple[Tensor, ...]] = []
    hooks = [
        layer.self_attn.attention.register_forward_pre_hook(
            lambda m, a: found.append(tuple(x.detach().float() for x in a[:3]))
        )
        for layer in model.decoder.layers
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


RUN = ""


def error() -> dict[str, Any]:
    "What leaving blocks out does to the attention of a trained model: error of the output, share of attention kept."
    from dilated_attention_nb.adaptive import BlockScorer, block_shares, scorer_loss
    from dilated_attention_nb.block_patterns import BlockPattern, block_pattern
    from dilated_attention_nb.block_sparse import block_sparse_attention
    from dilated_attention_nb.corpus import read_corpus
    from dilated_attention_nb.runs import load_run

    if not RUN:
        raise SystemExit("pass --run with the folder of a trained run, as runs/longnet from `make demo`")
    (model, config), n, size, steps = load_run(Path(RUN)), 4096, 64, 60
    corpus, torch_rng = read_corpus(config.text), torch.Generator().manual_seed(0)
    trained = json.loads((Path(RUN) / "results.json").read_text())
    layers = captured(model, corpus.held[:n][None].long())
    every = torch.arange(n // size)
    shares = [block_shares(q, k, every, size, True) for q, k, _ in layers]
    dense = [dense_attention([q, k, v], True) for q, k, v in layers]
    scorers = {rho: [BlockScorer(q.shape[3], size, rho) for q, _, _ in layers] for rho in (0.05, 0.1, 0.2, 0.4)}
    first = scorers[0.05]
    optimizer = torch.optim.Adam([p for s in first for p in s.parameters()], 0.01)
    for _ in range(steps):
        at = int(torch.randint(len(corpus.train) - n, (1,), generator=torch_rng))
        losses = []
        for scorer, (q, k, _) in zip(first, captured(model, corpus.train[at : at + n][None].long())):
            rows = torch.randint(n // size, (8,), generator=torch_rng)
            losses.append(scorer_loss(*scorer(q, k), block_shares(q, k, rows, size, True), rows, True))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    rows_: list[dict[str, Any]] = []
    for rho, own in scorers.items():
        for scorer, learned in zip(own, first):
            scorer.load_state_dict(learned.state_dict())
        names = ("local_window", "strided", "global_local", "random", "hierarchical", "adaptive", "best possible")
        for name in names:
            errors, kept = [], []
            for i, (q, k, v) in enumerate(layers):
                if name == "adaptive":
                    pattern = BlockPattern(*own[i].choose(*own[i](q, k), True), size, (n, n))
                elif name == "best possible":
                    counts = block_pattern(
                        "local_window", n, block_size=size, density=rho, is_causal=True
                    ).kv_num_blocks
                    order = (shares[i] + torch.eye(n // size)).argsort(3, descending=True).argsort(3)
                    pattern = BlockPattern.from_dense(order < counts[..., None], size, (n, n))
                else:
                    options = (
                        {"segment_lengths": (n,) * 3, "dilation_rates": (1, 2, 4)} if name == "hierarchical" else {}
                    )
                    pattern = block_pattern(
                        name, n, block_size=size, density=rho, is_causal=True, num_heads=q.shape[2], **options
                    )
                out = block_sparse_attention(q, k, v, pattern, is_causal=True)
                errors.append(float((out - dense[i]).norm() / dense[i].norm()))
                kept.append(float((shares[i] * pattern.to_dense()).sum(3).mean()))
            row = {"pattern": name, "rho": rho, "error": statistics.mean(errors), "kept": statistics.mean(kept)}
            rows_.append(row)
            print(row, flush=True)
    about = {"n": n, "block_size": size, "scorer_steps": steps, "bits_per_byte": trained["bits_per_byte"]}
    return about | {"layers": len(layers), "dtype": "float32", "rows": rows_}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f for f in (generation, speed_8k, speed_8k_wall, speed_32k, density, flex, memory, error)
}  # fmt: skip


def main() -> int:
    "The options that are this file's own, then those that all have."
    global CLOCK, ONLY, RUN
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--run", default="")
    own, rest = parser.parse_known_args()
    RUN, ONLY = own.run, set(own.only.split(",")) - {""}
    if unknown := ONLY - {"float32", "bfloat16", "causal", "full", "forward", "forward+backward"}:
        parser.error(f"unknown words in --only: {', '.join(sorted(unknown))}")
    if own.cpu_time:
        CLOCK = time.thread_time
        torch.set_num_threads(1)
    if own.cpu_time and "speed_8k_wall" in rest:
        parser.error("speed_8k_wall goes by the wall clock; leave out --cpu-time")
    left_out = {"error": not own.run, "speed_8k_wall": own.cpu_time}
    chosen = {name: f for name, f in SECTIONS.items() if not left_out.get(name) or name in rest}
    clock = {"clock": "CPU" if own.cpu_time else "wall"}
    return run_sections(__doc__, RESULTS, chosen, rest, origin=lambda: environment() | clock)


if __name__ == "__main__":
    sys.exit(main())
