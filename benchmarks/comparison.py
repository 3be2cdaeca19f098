"""Compare methods in time, memory and quality, and store the figures in benchmarks/comparison.json.

    python benchmarks/comparison.py                   all sections (about forty minutes on two cores)
    python benchmarks/comparison.py time memory       some of them
    python benchmarks/comparison.py --check quick     store nothing; say what is worse than what is stored

Times are medians of runs that alternate within one process, memory is the peak of a process of its own. Beyond 65,536
tokens each run is taken once, and what would take minutes or more memory than there is is left out: the rows say so.
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
    LONG,
    LONGEST,
    RATES,
    Limits,
    attention_work,
    dilated_pairs,
    in_turn,
    measure_limits,
    medians,
    method,
    one_call,
    ratio,
    run_sections,
    show_rows,
    torchscale_attention,
)

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


def timed(lengths: tuple[int, ...], dtype: torch.dtype, most: int) -> Iterator[dict[str, Any]]:
    "Every method at every length that it can do, relative to `improved`."
    for n in lengths:
        for what in ("forward", "forward+backward"):
            both = what != "forward"
            names = [x for x, longest in LONGEST.items() if n <= (longest if both else 2 * longest)]
            names = [x for x in names if not (both and x == "flex")]  # no backward pass on the CPU
            seconds = in_turn(passes(n, dtype, both, names), most if n <= 8192 else min(most, 3) if n <= 32_768 else 1)
            for name in names:
                row = {"n": n, "what": what, "method": name, "ratio": ratio(seconds, name, "improved")}
                yield row | {"ms": medians(seconds)[name] * 1e3}


def time_() -> dict[str, Any]:
    "bfloat16, 2K to 64K tokens."
    lengths = tuple(2**p for p in range(11, 17))
    return ABOUT | {"dtype": "bfloat16", "rows": show_rows(timed(lengths, torch.bfloat16, 5))}


def timed_long(lengths: tuple[int, ...], what: str) -> Iterator[dict[str, Any]]:
    "Every method once at every length, relative to `improved`; or why it is left out."
    both = what != "forward"
    for n in lengths:
        names = [name for name, (most, _) in LONG.items() if n <= (most // 4 if both else most)]
        seconds = in_turn(passes(n, torch.bfloat16, both, names), 0)
        for name, (_, why) in LONG.items():
            row: dict[str, Any] = {"n": n, "what": what, "method": name}
            if name in names:
                row |= {"ratio": ratio(seconds, name, "improved"), "ms": medians(seconds)[name] * 1e3}
            else:
                row["left_out"] = why
            yield row


def time_long() -> dict[str, Any]:
    "bfloat16, forward, 128K to 1M tokens."
    lengths = tuple(2**p for p in range(17, 21))
    return ABOUT | {"dtype": "bfloat16", "rows": show_rows(timed_long(lengths, "forward"))}


def time_long_backward() -> dict[str, Any]:
    "bfloat16, forward and backward, 128K and 256K tokens; up to 1M, `improved` alone, in core.py."
    return ABOUT | {"dtype": "bfloat16", "rows": show_rows(timed_long((2**17, 2**18), "forward+backward"))}


def quick() -> dict[str, Any]:
    "A few methods at one length: what `make bench-check` looks at."
    return ABOUT | {"dtype": "float32", "rows": show_rows(timed((4096,), torch.float32, 9))}


def memory() -> dict[str, Any]:
    "Peaks of processes, forward and backward, beyond what they held before."
    from dilated_attention_nb.testing import peak_memory

    def rows() -> Iterator[dict[str, Any]]:
        for n in (8192, 32_768, 131_072):
            for name, longest in LONGEST.items():
                if n <= longest and name != "flex":
                    peak = peak_memory(one_call, name, n, H, D, torch.bfloat16, True, timeout_s=1200)
                    yield {"n": n, "method": name, "peak_mib": peak.extra / 2**20}

    return ABOUT | {"dtype": "bfloat16", "what": "forward+backward", "rows": show_rows(rows())}


def memory_long() -> dict[str, Any]:
    "The same, forward alone, 256K to 1M tokens."
    from dilated_attention_nb.testing import peak_memory

    def rows() -> Iterator[dict[str, Any]]:
        for n in (2**18, 2**19, 2**20):
            for name, (most, why) in LONG.items():
                row: dict[str, Any] = {"n": n, "method": name}
                if n <= most:
                    peak = peak_memory(one_call, name, n, H, D, torch.bfloat16, False, timeout_s=1200)
                    row["peak_mib"] = peak.extra / 2**20
                else:
                    row["left_out"] = why
                yield row

    return ABOUT | {"dtype": "bfloat16", "what": "forward", "rows": show_rows(rows())}


def bare(n: int, dtype: torch.dtype, both: bool) -> Callable[[], Any]:
    "The kernels alone, on tensors gathered beforehand."
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    shapes = [(n // w, H, w // r, D) for w, r in zip(LENGTHS, RATES)]
    x = [[torch.randn(shape).to(dtype) for _ in range(4)] for shape in shapes]
    kept = [forward(*qkv, 0.0, True) for *qkv, _ in x]

    def run() -> None:
        for (*qkv, dout), (out, lse) in zip(x, kept):
            forward(*qkv, 0.0, True)
            if both:
                backward(dout, *qkv, out, lse, 0.0, True)

    return run


def roofline() -> dict[str, Any]:
    "Shares of what the device can do, of `improved` and of the bare kernels."

    def rows() -> Iterator[dict[str, Any]]:
        for dtype in (torch.float32, torch.bfloat16):
            limits: Limits = measure_limits(dtype)
            for n in (16_384,):
                pairs = dilated_pairs(n, H, LENGTHS, RATES, True, "softmax")
                for what in ("forward", "forward+backward"):
                    both = what != "forward"
                    runs = passes(n, dtype, both, ["improved"]) | {"floor": bare(n, dtype, both)}
                    found = medians(in_turn(runs, 5 if n == 16_384 else 2))
                    work = attention_work(pairs, n * H * D, D, torch.finfo(dtype).bits // 8, both)
                    row = {"n": n, "dtype": str(dtype)[6:], "what": what}
                    row |= {"share": limits.share(work, found["improved"]), "gflops": limits.flops / 1e9}
                    row |= {"floor_share": limits.share(work, found["floor"]), "gb_s": limits.bandwidth / 1e9}
                    yield row | {"ms": found["improved"] * 1e3, "least_ms": limits.seconds(work) * 1e3}

    return ABOUT | {"rows": show_rows(rows())}


class Detached(torch.nn.Module):
    "LongNet's attention with torchscale's gradient, or with the exact one by the same method."

    def __init__(self, config: Any, exact: bool) -> None:
        super().__init__()
        self.config, self.exact = config, exact

    def forward(self, q: Any, k: Any, v: Any, is_causal: bool = False, key_padding_mask: Any = None) -> torch.Tensor:
        c = self.config
        return torchscale_attention(q, k, v, c.segment_lengths, c.dilation_rates, is_causal, self.exact)


SECONDS, CONTEXT = 120.0, 16_384  # of CPU time, so that a shared machine gives every model the same


def budget_plan(
    stage: int, taken: list[int], seconds: list[float], elapsed: float, budget: float, context: int
) -> tuple[tuple[int, int], ...]:
    "Steps taken in each stage, and as many more, from `stage` on, as end within each stage's share of the budget."
    from dilated_attention_nb.training import STAGES

    plan, end = [], 0.0
    for i, (part, share) in enumerate(STAGES):
        end += share * budget
        more = max(0, int((end - elapsed) / seconds[i] + 1e-9)) if i >= stage else 0
        elapsed += more * seconds[i]
        plan.append((context // part, taken[i] + more))
    return tuple(plan)


def train_for(
    budget: float, seconds: list[float], take: Callable[[Any, int], None], clock: Callable[[], float], context: int
) -> tuple[int, float]:
    """Take steps of all stages until no more fits into the budget; returns their number and the time that they took.

    The plan is made anew before every step, from what the steps of its stage took so far. So the last one ends less
    than one step, the longest, before the time is over, and the rates of learning have then come down as planned.
    """
    taken, spent, stage, begin = [0 for _ in seconds], [0.0 for _ in seconds], 0, clock()
    while True:
        elapsed = clock() - begin
        each = [s / n if n else first for s, n, first in zip(spent, taken, seconds)]
        plan = budget_plan(stage, taken, each, elapsed, budget, context)
        while stage < len(plan) and plan[stage][1] == taken[stage]:
            stage += 1
        if stage == len(plan):
            return sum(taken), elapsed
        take(plan, sum(taken))
        spent[stage] += clock() - begin - elapsed
        taken[stage] += 1


def trained(name: str, shape: dict[str, Any], attention: Callable[[], torch.nn.Module] | None) -> dict[str, Any]:
    "A demo model with other attention, trained for `SECONDS`, evaluated on held-out text."
    from dilated_attention_nb.longnet import LongNetConfig
    from dilated_attention_nb.training import (
        DEFAULTS,
        STAGES,
        VOCAB,
        TrainingConfig,
        bits_per_byte,
        fast_dtype,
        make_model,
        make_optimizers,
        read_corpus,
        train_step,
    )

    corpus = read_corpus()
    wanted = {"segment_lengths": DEFAULTS["segments"], "dilation_rates": DEFAULTS["rates"]} | shape
    model_config = LongNetConfig(
        DEFAULTS["width"], DEFAULTS["layers"], DEFAULTS["heads"], vocab_size=VOCAB, position="rope",
        tie_embeddings=False, bias=False, **wanted,
    )  # fmt: skip
    config = TrainingConfig(model_config, corpus.digest, (), context=CONTEXT, dtype=fast_dtype("cpu"))

    def make(config: TrainingConfig) -> Any:
        model = make_model(config)
        for layer in model.decoder.layers if attention else ():
            layer.self_attn.attention = attention()  # type: ignore[misc]
        return model, make_optimizers(model, config)

    model, optimizers = make(config)
    steps = []
    for part, _ in STAGES:
        stage, times = replace(config, plan=((CONTEXT // part, 4),)), []
        for step in range(4):
            begin = time.process_time()
            train_step(model, optimizers, stage, corpus.train, step)
            times.append(time.process_time() - begin)
        steps.append(min(times[1:]))
    model, optimizers = make(config)

    def take(plan: Any, step: int) -> None:
        train_step(model, optimizers, replace(config, plan=plan), corpus.train, step)

    count, seconds = train_for(SECONDS, steps, take, time.process_time, CONTEXT)
    model.eval()
    held = corpus.held[: config.eval_bytes + 1]
    found = {f"at_{n}": bits_per_byte(model, config, held, n) for n in (1024, CONTEXT)}
    row = {"model": name, "bits_per_byte": found[f"at_{CONTEXT}"], "at_1024": found["at_1024"]}
    return row | {"steps": count, "trained_s": seconds, "ms_a_step": [1e3 * s for s in steps]}


def quality() -> dict[str, Any]:
    "Demo models that differ in who sees whom, or in the gradient, after the same time."
    from dilated_attention_nb.block_sparse import BlockSparseAttention
    from dilated_attention_nb.config import DilatedAttentionConfig, SparseAttentionConfig
    from dilated_attention_nb.training import DEFAULTS, fast_dtype

    def gradient(exact: bool) -> Callable[[], torch.nn.Module]:
        config = DilatedAttentionConfig(DEFAULTS["segments"], DEFAULTS["rates"], mixing="softmax")
        return lambda: Detached(config, exact)

    def blocks() -> torch.nn.Module:
        return BlockSparseAttention(
            SparseAttentionConfig(
                (CONTEXT,), (1,), pattern_type="global_local", sparsity_ratio=0.1, block_size=128, ragged="mask"
            )
        )

    torch.set_num_threads(1)
    models: dict[str, tuple[dict[str, Any], Any]] = {
        "dilated, softmax mixing": ({}, None),
        "the same, torchscale's method, exact": ({}, gradient(True)),
        "the same, torchscale's gradient": ({}, gradient(False)),
        "dilated, groups mixing": (
            {"mixing": "groups", "segment_lengths": (1024, CONTEXT), "dilation_rates": (1, 16)},
            None,
        ),
        "dense": ({"segment_lengths": (CONTEXT,), "dilation_rates": (1,)}, None),
        "window of 1,024 alone": ({"segment_lengths": (1024,), "dilation_rates": (1,)}, None),
        "block-sparse, a tenth": ({"segment_lengths": (CONTEXT,), "dilation_rates": (1,)}, blocks),
    }
    rows = show_rows(trained(name, shape, attention) for name, (shape, attention) in models.items())
    about = {"dtype": fast_dtype("cpu"), "threads": 1, "clock": "CPU time"}
    return about | {"seconds": SECONDS, "context": CONTEXT, "rows": rows}


SECTIONS = {
    "quick": quick,
    "roofline": roofline,
    "time": time_,
    "time_long": time_long,
    "time_long_backward": time_long_backward,
    "memory": memory,
    "memory_long": memory_long,
    "quality": quality,
}

if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS))
