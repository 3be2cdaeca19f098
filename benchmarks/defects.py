"""Measure again the comparison of a predecessor's report and store the figures in benchmarks/defects.json.

    python benchmarks/defects.py            the one section, in about a minute
    python benchmarks/defects.py --check    store nothing; say what is worse than what is stored

The report ("phase 1.1") compares a standard with an improved form at 2,048 to 16,384 tokens, batch 1, 8 heads of 64,
calls the latter up to 1.51 times faster and the difference below 1e-6. That improved form attended over the heads of
each token. Here are the two forms of this library, which are one function, and beside them the one across heads, each
with its largest difference from the float64 definition. The report names no segments: these are chosen here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dilated_attention_nb.benchmarks import in_turn, medians, ratio, run_sections

RESULTS = Path(__file__).with_name("defects.json")
H, D = 8, 64
LENGTHS, RATES = (512, 1024, 2048), (1, 2, 4)


def across_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    "The smallest wrong version: dilated groups of heads, attended to on `[segments, tokens, heads, d]`."
    from dilated_attention_nb.masking import head_groups

    out = torch.zeros_like(q)
    for g, (w, r, heads) in enumerate(zip(LENGTHS, RATES, head_groups(H, len(RATES)))):
        cut = (slice(None), slice(None), slice(g % r, None, r), slice(heads.start, heads.stop))
        parts = [x.unflatten(1, (-1, w))[cut] for x in (q, k, v)]
        out.unflatten(1, (-1, w))[cut] = scaled_dot_product_attention(*parts)
    return out / len(RATES)


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    "The dense float64 softmax, block by block of the longest segment: no branch reaches across."
    from dilated_attention_nb.masking import attention_counts
    from dilated_attention_nb.testing import plain_attention

    w = max(LENGTHS)
    counts, zeros = attention_counts(w, w, H, LENGTHS, RATES), torch.zeros(H, w, dtype=torch.int64)
    blocks = zip(*(x.double().split(w, 1) for x in (q, k, v)))
    return torch.cat([plain_attention(*block, counts, zeros, divisor=len(RATES)) for block in blocks], 1)


def forms() -> dict[str, Callable[..., Tensor]]:
    "What is compared: two that are one function, and one that isn't."
    from dilated_attention_nb.config import DilatedAttentionConfig
    from dilated_attention_nb.dilated import DilatedAttention
    from dilated_attention_nb.improved import ImprovedDilatedAttention

    config = DilatedAttentionConfig(LENGTHS, RATES)
    return {
        "standard": DilatedAttention(config),
        "improved": ImprovedDilatedAttention(config),
        "across_heads": across_heads,
    }


def differences(x: list[Tensor]) -> dict[str, float]:
    "The largest of each form from the definition."
    exact = definition(*x)
    return {f"{name}_difference": float((form(*x) - exact).abs().max()) for name, form in forms().items()}


def phase_1_1() -> dict[str, Any]:
    "Times in turn, and differences from the definition."
    rows = []
    for n in (2048, 4096, 8192, 16_384):
        torch.manual_seed(0)
        x = [torch.randn(1, n, H, D) for _ in range(3)]
        leaves, dout = [y.clone().requires_grad_() for y in x], torch.randn(1, n, H, D)
        row: dict[str, Any] = {"n": n} | differences(x)
        seconds = in_turn({name: (lambda f=form, x=x: f(*x)) for name, form in forms().items()}, 15)  # type: ignore[misc]
        row |= {f"{name}_ms": s * 1e3 for name, s in medians(seconds).items()}
        row["speedup"] = ratio(seconds, "standard", "improved")
        both = in_turn(
            {
                name: (lambda f=form, x=leaves, g=dout: torch.autograd.grad(f(*x), x, g))  # type: ignore[misc]
                for name, form in forms().items()
            },
            9,
        )
        row |= {f"{name}_backward_ms": s * 1e3 for name, s in medians(both).items()}
        row["backward_speedup"] = ratio(both, "standard", "improved")
        rows.append(row)
        print(row, flush=True)
    about = {"batch": 1, "heads": H, "head_dim": D, "dtype": "float32", "causal": False, "mixing": "groups"}
    return about | {"segment_lengths": LENGTHS, "dilation_rates": RATES, "rows": rows}


if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, {"phase_1_1": phase_1_1}))
