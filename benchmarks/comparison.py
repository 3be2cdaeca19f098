"""Compare methods in time, memory and quality, and store the figures in benchmarks/comparison.json.

    python benchmarks/comparison.py                   all sections (about two hours on two cores)
    python benchmarks/comparison.py time memory       some of them
    python benchmarks/comparison.py --check quick     store nothing; say what is worse than what is stored

Times are medians of runs that alternate within one process, memory is the peak of a process of its own. At 65,536 and
131,072 tokens each run is taken once after one of warm-up, beyond once, cold. What would take minutes or more than
16 GiB is left out: the rows say so. `ratio` is the time over that of dense attention, which no change of this library
moves: at the same length, in the sections `time_long...` at 32,768 tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dilated_attention_nb.benchmarks import (
    LENGTHS,
    RATES,
    REACH,
    Limits,
    attention_work,
    dilated_pairs,
    in_turn,
    left_out,
    measure_limits,
    medians,
    method,
    one_call,
    ratio,
    read_results,
    run_sections,
    show_rows,
    torchscale_attention,
)
from dilated_attention_nb.masking import clipped

RESULTS = Path(__file__).with_name("comparison.json")
H, D = 8, 64
ABOUT = {"heads": H, "head_dim": D, "causal": True, "segment_lengths": LENGTHS, "dilation_rates": RATES}


def passes(n: int, dtype: torch.dtype, both: bool, names: list[str]) -> dict[str, Callable[[], Any]]:
    "A forward pass by each method, or a forward and a backward pass."
    x = [torch.randn(1, n, H, D).to(dtype).requires_grad_(both) for _ in range(3)]
    dout = torch.randn(1, n, H, D).to(dtype)

    def run(attend: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        return (lambda: torch.autograd.grad(attend(*x), x, dout)) if both else (lambda: attend(*x))

    return {name: run(method(name, n, H, True)) for name in names}


SHORT = 32_768  # dense attention of so many tokens is what long lengths are compared with


def timed(
    lengths: tuple[int, ...],
    whats: tuple[str, ...],
    dtype: torch.dtype,
    repeats: Callable[[int], int],
    same: bool = True,
) -> Iterator[dict[str, Any]]:
    "Every method at every length, relative to dense attention of the `same` length or of `SHORT`; or why it isn't."
    for n in lengths:
        for what in whats:
            both = what != "forward"
            names = [name for name in REACH if not left_out(name, n, both)]
            runs = passes(n, dtype, both, names)
            if not same:
                runs["reference"] = passes(SHORT, dtype, both, ["dense"])["dense"]
            seconds = in_turn(runs, repeats(n))
            for name in REACH:
                row: dict[str, Any] = {"n": n, "what": what, "method": name}
                if name in names:
                    row |= {"ratio": ratio(seconds, name, "dense" if same else "reference")}
                    row |= {"ms": medians(seconds)[name] * 1e3}
                else:
                    row["left_out"] = left_out(name, n, both)
                yield row


BOTH = ("forward", "forward+backward")


def time_() -> dict[str, Any]:
    "bfloat16, 2K to 64K tokens."
    lengths = tuple(2**p for p in range(11, 17))
    rows = timed(lengths, BOTH, torch.bfloat16, lambda n: 5 if n <= 8192 else 3 if n <= 32_768 else 1)
    return ABOUT | {"dtype": "bfloat16", "rows": show_rows(rows)}


def timed_long(lengths: tuple[int, ...], what: str) -> dict[str, Any]:
    rows = timed(lengths, (what,), torch.bfloat16, lambda n: 1 if n <= 131_072 else 0, same=False)
    return ABOUT | {"dtype": "bfloat16", "ratio_to": f"dense, {SHORT} tokens", "rows": show_rows(rows)}


def time_long() -> dict[str, Any]:
    "bfloat16, forward, 128K to 2M tokens."
    return timed_long(tuple(2**p for p in range(17, 22)), "forward")


def time_long_backward() -> dict[str, Any]:
    "bfloat16, forward and backward, 128K and 256K tokens; up to 1M, `improved` alone, in core.py."
    return timed_long((2**17, 2**18), "forward+backward")


def quick() -> dict[str, Any]:
    "All methods at one length: what `make bench-check` looks at."
    return ABOUT | {"dtype": "float32", "rows": show_rows(timed((4096,), BOTH, torch.float32, lambda n: 9))}


TINY = 256  # tokens


def peaks(lengths: tuple[int, ...], both: bool) -> dict[str, Any]:
    """Peaks of processes, inputs included, beyond that of the same call with `TINY` tokens.

    So code that PyTorch loads in a first call isn't counted: some 150 MiB for an operator, 250 for what is compiled.
    """
    from dilated_attention_nb.processes import peak_memory

    def peak(name: str, n: int) -> int:
        return peak_memory(one_call, name, n, H, D, torch.bfloat16, both, timeout_s=1200).extra

    def rows() -> Iterator[dict[str, Any]]:
        loaded = {name: peak(name, TINY) for name in REACH if not left_out(name, TINY, both)}
        for n in lengths:
            for name in REACH:
                row: dict[str, Any] = {"n": n, "method": name}
                if why := left_out(name, n, both):
                    row["left_out"] = why
                else:
                    row["peak_mib"] = (peak(name, n) - loaded[name]) / 2**20
                yield row

    return ABOUT | {"dtype": "bfloat16", "what": BOTH[both], "rows": show_rows(rows())}


def memory() -> dict[str, Any]:
    "Peaks of processes, forward and backward, 2K to 128K tokens."
    return peaks((2**11, 2**13, 2**15, 2**17), True)


def memory_long() -> dict[str, Any]:
    "The same, forward alone, 2K to 2M tokens."
    return peaks((2**11, 2**13, 2**15, 2**17, 2**19, 2**21), False)


def bare(n: int, dtype: torch.dtype, both: bool) -> Callable[[], Any]:
    "The kernels alone, on tensors gathered beforehand."
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    shapes = [(n // w, H, w // r, D) for w, r in zip(clipped(LENGTHS, n), RATES)]
    x = [[torch.randn(shape).to(dtype) for _ in range(4)] for shape in shapes]
    kept = [forward(*qkv, 0.0, True) for *qkv, _ in x]

    def run() -> None:
        for (*qkv, dout), (out, lse) in zip(x, kept):
            forward(*qkv, 0.0, True)
            if both:
                backward(dout, *qkv, out, lse, 0.0, True)

    return run


def roofline() -> dict[str, Any]:
    "Shares of what the device can do: of `improved`, of the bare kernels and, up to 16K tokens, of dense attention."

    def rows() -> Iterator[dict[str, Any]]:
        for dtype in (torch.float32, torch.bfloat16):
            for n in (4096, 16_384, 65_536):
                limits: Limits = measure_limits(dtype)
                dilated = dilated_pairs(n, H, LENGTHS, RATES, True, "softmax")
                pairs = {"improved": dilated, "bare kernels": dilated}
                if n <= 16_384:
                    pairs["dense"] = dilated_pairs(n, H, (n,), (1,), True)
                for what in BOTH:
                    both = what != "forward"
                    runs = passes(n, dtype, both, [x for x in pairs if x in REACH])
                    seconds = in_turn(runs | {"bare kernels": bare(n, dtype, both)}, 7 if n == 4096 else 3)
                    for name, taken in medians(seconds).items():
                        work = attention_work(pairs[name], n * H * D, D, torch.finfo(dtype).bits // 8, both)
                        row = {"n": n, "dtype": str(dtype)[6:], "what": what, "method": name}
                        row |= {"share": limits.share(work, taken), "gflops": work.flops / taken / 1e9}
                        row |= {"intensity": work.intensity, "ms": taken * 1e3, "least_ms": limits.seconds(work) * 1e3}
                        yield row | {"most_gflops": limits.flops / 1e9, "most_gb_s": limits.bandwidth / 1e9}

    return ABOUT | {"rows": show_rows(rows())}


class Detached(torch.nn.Module):
    "LongNet's attention with torchscale's gradient, or with the exact one by the same method."

    def __init__(self, config: Any, exact: bool) -> None:
        super().__init__()
        self.config, self.exact = config, exact

    def forward(self, q: Any, k: Any, v: Any, is_causal: bool = False, key_padding_mask: Any = None) -> torch.Tensor:
        c = self.config
        return torchscale_attention(q, k, v, c.segment_lengths, c.dilation_rates, is_causal, self.exact)


SECONDS, SEEDS, CONTEXT = 90.0, (0, 1), 16_384  # of CPU time
BRANCHES = (1024, 4096, 16_384), (1, 4, 16)  # of the demo


class Demo:
    "A demo model with other attention, and how it is trained and evaluated."

    def __init__(self, shape: dict[str, Any], attention: Callable[[], torch.nn.Module] | None, seed: int = 0) -> None:
        from dilated_attention_nb.command import DEFAULTS
        from dilated_attention_nb.corpus import NGRAMS, VOCAB, read_corpus
        from dilated_attention_nb.longnet import LongNetConfig
        from dilated_attention_nb.training import TrainingConfig, fast_dtype, make_model, make_optimizers

        wanted = {"segment_lengths": BRANCHES[0], "dilation_rates": BRANCHES[1]} | shape
        model_config = LongNetConfig(
            DEFAULTS["width"], DEFAULTS["layers"], DEFAULTS["heads"], vocab_size=VOCAB, position="rope",
            tie_embeddings=False, bias=False, ngrams=NGRAMS, **wanted,
        )  # fmt: skip
        self.corpus = read_corpus()
        self.config = TrainingConfig(
            model_config, self.corpus.digest, (), context=CONTEXT, dtype=fast_dtype("cpu"), seed=seed
        )
        self.model: Any = make_model(self.config)
        for layer in self.model.decoder.layers if attention else ():
            layer.self_attn.attention = attention()  # type: ignore[misc]
        self.optimizers = make_optimizers(self.model, self.config)

    def take(self, plan: Any, step: int) -> None:
        "One step of a plan."
        from dilated_attention_nb.training import train_step

        train_step(self.model, self.optimizers, replace(self.config, plan=plan), self.corpus.train, step)

    def held_out(self) -> dict[str, float]:
        "Bits per byte of held-out text, with the whole context and with 1,024 tokens."
        from dilated_attention_nb.training import bits_per_byte

        self.model.eval()
        held = self.corpus.held[: self.config.eval_bytes + 1]
        both = [bits_per_byte(self.model, self.config, held, n) for n in (CONTEXT, 1024)]
        return {"bits_per_byte": both[0], "at_1024": both[1]}


def demos() -> dict[str, tuple[dict[str, Any], Callable[[], torch.nn.Module] | None]]:
    "What differs between the models: who sees whom, or the gradient."
    from dilated_attention_nb.block_sparse import BlockSparseAttention, SparseAttentionConfig
    from dilated_attention_nb.config import DilatedAttentionConfig

    def gradient(exact: bool) -> Callable[[], torch.nn.Module]:
        config = DilatedAttentionConfig(BRANCHES[0], BRANCHES[1], mixing="softmax")
        return lambda: Detached(config, exact)

    def blocks() -> torch.nn.Module:
        return BlockSparseAttention(
            SparseAttentionConfig(
                (CONTEXT,), (1,), pattern_type="global_local", density=0.1, block_size=128, ragged="mask"
            )
        )

    return {
        "dilated, softmax mixing": ({}, None),
        "dilated, torchscale's method": ({}, gradient(True)),
        "dilated, torchscale's gradient": ({}, gradient(False)),
        "dilated, groups mixing": (
            {"mixing": "groups", "segment_lengths": (1024, CONTEXT), "dilation_rates": (1, 16)},
            None,
        ),
        "dense": ({"segment_lengths": (CONTEXT,), "dilation_rates": (1,)}, None),
        "window of 1,024": ({"segment_lengths": (1024,), "dilation_rates": (1,)}, None),
        "block-sparse, a tenth": ({"segment_lengths": (CONTEXT,), "dilation_rates": (1,)}, blocks),
    }


ORIGINAL = "dilated, softmax mixing"
SAME = {ORIGINAL, "dilated, torchscale's method"}  # the same model, computed in two ways


def about_demos() -> dict[str, Any]:
    "One thread, and its CPU time."
    from dilated_attention_nb.training import fast_dtype

    torch.set_num_threads(1)
    return {"dtype": fast_dtype("cpu"), "threads": 1, "clock": "CPU time", "context": CONTEXT}


def quality_costs() -> dict[str, Any]:
    "What a training step of each model takes in each stage, in turn, and relative to the dense model's."
    from dilated_attention_nb.training import STAGES

    about = about_demos()
    models = {name: Demo(*what) for name, what in demos().items()}

    def rows() -> Iterator[dict[str, Any]]:
        for part, _ in STAGES:
            steps = {name: iter(range(9)) for name in models}
            plan = ((CONTEXT // part, 9),)
            runs = {x: (lambda d=d, s=steps[x], p=plan: d.take(p, next(s))) for x, d in models.items()}
            seconds = in_turn(runs, 5, clock=time.process_time)
            for name, taken in medians(seconds).items():
                yield {"model": name, "n": CONTEXT // part, "ratio": ratio(seconds, name, "dense"), "ms": taken * 1e3}

    return about | {"rows": show_rows(rows())}


def quality_plans(costs: dict[str, Any]) -> Iterator[tuple[str, str, int, tuple[tuple[int, int], ...]]]:
    """Which model takes which steps with which seed: those that fit into `SECONDS`, and those of `ORIGINAL`.

    From stored costs, which were taken in turn: what else the machine does while a model learns changes nothing then.
    """
    from dilated_attention_nb.training import make_plan

    seconds = {name: [r["ms"] / 1e3 for r in costs["rows"] if r["model"] == name] for name in demos()}
    plans = {name: make_plan(taken, SECONDS, CONTEXT) for name, taken in seconds.items()}
    for seed in SEEDS:
        for name in seconds:
            yield "time", name, seed, plans[name]
            if name not in SAME:  # the original takes these steps anyway
                yield "steps", name, seed, plans[ORIGINAL]


def quality() -> dict[str, Any]:
    "Held-out bits per byte after the same time, and after the same steps on the same text in the same order."
    about, what = about_demos(), demos()

    def rows() -> Iterator[dict[str, Any]]:
        for equal, name, seed, plan in quality_plans(read_results(RESULTS)["quality_costs"]):
            demo, steps, begin = Demo(*what[name], seed), sum(count for _, count in plan), time.process_time()
            for step in range(steps):
                demo.take(plan, step)
            seconds = time.process_time() - begin
            row = {"model": name, "equal": equal, "seed": seed} | demo.held_out()
            yield row | {"steps": steps, "plan": plan, "trained_s": seconds}

    return about | {"seconds": SECONDS, "rows": show_rows(rows())}


SECTIONS = {
    "quick": quick,
    "roofline": roofline,
    "time": time_,
    "time_long": time_long,
    "time_long_backward": time_long_backward,
    "memory": memory,
    "memory_long": memory_long,
    "quality_costs": quality_costs,
    "quality": quality,
}

if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS))
