"""Measure the GigaPath slide encoder and store the figures in benchmarks/interop.json.

python benchmarks/interop.py                     all sections (a quarter of an hour on one core)
python benchmarks/interop.py algorithm memory    some of them
python benchmarks/interop.py --check memory      store nothing; say what is worse than what is stored
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dilated_attention_nb.benchmarks import in_turn, medians, ratio, run_sections

RESULTS = Path(__file__).with_name("interop.json")
torch.set_num_threads(1)


def make(**values: Any) -> Any:
    from dilated_attention_nb.gigapath import GigaPathSlideEncoder

    torch.manual_seed(0)
    return GigaPathSlideEncoder(**values).eval()


def tiles(n: int) -> tuple[Tensor, Tensor]:
    "Random tiles in a nearly square piece of tissue."
    side = math.ceil(n**0.5)
    places = torch.arange(n)
    coords = torch.stack((places % side, places // side), -1) * 256
    return torch.randn(1, n, 1536), coords[None].float()


class PadAndDiagonal(nn.Module):
    """torchscale's algorithm, on the kernel that ours uses.

    Per branch: pad to whole segments, pad segments and heads to multiples of r, take the diagonal of (offset, group of
    heads), attend, put the result back on the diagonal of a tensor of zeros. Then a softmax over the branches' lse.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def sparse(self, x: Tensor, w: int, r: int) -> Tensor:
        "`[b, n, h, d]` -> `[b * segments, tokens, h, d]`"
        b, n, h, d = x.shape
        x = F.pad(x, (0, 0, 0, 0, 0, -n % w)).reshape(-1, w, h, d)
        x = F.pad(x, (0, 0, 0, -h % r, 0, -w % r))
        x = x.unflatten(2, (r, -1)).unflatten(1, (-1, r))  # segment, token, offset, group, head, d
        return x.diagonal(dim1=2, dim2=3).permute(0, 1, 4, 2, 3).flatten(2, 3)[:, :, :h].contiguous()

    def dense(self, x: Tensor, n: int, w: int, r: int, empty: float) -> Tensor:
        "The other way: `[b * segments, tokens, h, d]` -> `[b, n, h, d]`"
        g, count, h, d = x.shape
        x = F.pad(x, (0, 0, 0, -h % r), value=empty).unflatten(2, (r, -1))
        out = x.new_full((g, count, r, r, x.shape[3], d), empty)
        out.diagonal(dim1=2, dim2=3).copy_(x.permute(0, 1, 3, 4, 2))
        out = out.flatten(3, 4).flatten(1, 2)[:, :w, :h]
        return out.reshape(-1, math.ceil(n / w) * w, h, d)[:, :n]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, key_padding_mask: Any = None) -> Tensor:
        n, outs, sums = q.shape[1], [], []
        for w, r in zip(self.config.segment_lengths, self.config.dilation_rates):
            w = min(w, n)
            gq, gk, gv = (self.sparse(x, w, r).transpose(1, 2) for x in (q, k, v))
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(gq, gk, gv, 0.0, False)
            outs.append(self.dense(o.transpose(1, 2), n, w, r, 0.0))
            sums.append(self.dense(lse.transpose(1, 2)[..., None], n, w, r, -1e8))
        weights = torch.stack(sums).softmax(0)
        return (torch.stack(outs) * weights).sum(0)


def with_attention(model: Any, build: Any) -> Any:
    for layer in model.encoder.layers:
        layer.self_attn.attention = build(layer.self_attn.attention_config)
    return model


@torch.no_grad()
def algorithm() -> dict[str, Any]:
    "The whole encoder with our attention and with torchscale's algorithm, in turn."
    rows = []
    for n, depth, repeats in ((1_000, 12, 7), (10_000, 3, 3), (30_000, 1, 3)):
        ours, theirs = make(depth=depth), with_attention(make(depth=depth), PadAndDiagonal)
        x, coords = tiles(n)
        error = float((ours(x, coords) - theirs(x, coords)).abs().max())
        assert error < 1e-4, error
        t = in_turn({"ours": lambda: ours(x, coords), "theirs": lambda: theirs(x, coords)}, repeats)  # noqa: B023
        row: dict[str, Any] = {"tiles": n, "depth": depth, "error": error}
        row["throughput_ratio"] = ratio(t, "theirs", "ours")
        x = torch.randn(3, 1, n + 1, 16, 48)
        parts = {"ours": ours, "theirs": theirs}
        alone = {name: (lambda m=m: m.encoder.layers[0].self_attn.attention(*x)) for name, m in parts.items()}  # noqa: B023
        t2 = in_turn(alone, repeats)
        row["attention_ratio"] = ratio(t2, "theirs", "ours")
        rows.append(row | {f"{name}_s": seconds for name, seconds in medians(t).items()})
        print(rows[-1], flush=True)
    return {"dtype": "float32", "rows": rows}


def build_and_run(n: int, theirs: bool = False) -> None:
    "The released model's size, after a few tiles, so that all code is loaded; with n = 0 these are all."
    model = make()
    if theirs:
        with_attention(model, PadAndDiagonal)
    with torch.no_grad():
        model(*tiles(16))
        if n:
            model(*tiles(n))


def in_a_process(*args: Any) -> tuple[int, float]:
    "Peak resident bytes and CPU seconds of a process that runs `build_and_run`; one thread: the time of an idle core."
    from interop import build_and_run as importable

    from dilated_attention_nb.processes import peak_memory

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    begin = spent()
    peak = peak_memory(importable, *args, timeout_s=3000).peak
    return peak, spent() - begin


def grown(sizes: tuple[int, ...], theirs: tuple[int, ...] = ()) -> dict[str, Any]:
    "Peak memory beyond parameters and code, and CPU time, each in a process of its own."
    rows = []
    built, start = in_a_process(0)
    theirs_built = in_a_process(0, True)[0] if theirs else 0
    for n in sizes:
        peak, seconds = in_a_process(n)
        rows.append({"tiles": n, "extra_mib": (peak - built) / 2**20, "seconds": seconds - start})
        if n in theirs:
            rows[-1]["theirs_mib"] = (in_a_process(n, True)[0] - theirs_built) / 2**20
        print(rows[-1], flush=True)
    with torch.device("meta"):
        count = sum(p.numel() for p in make().parameters())
    about = {"dtype": "float32", "layers": 12, "width": 768, "parameters_mib": count * 4 / 2**20}
    return about | {"rows": rows}


def memory() -> dict[str, Any]:
    "Up to ten thousand tiles, with torchscale's algorithm for comparison."
    return grown((1_000, 10_000), (1_000, 10_000))


def large() -> dict[str, Any]:
    "A hundred thousand tiles."
    return grown((100_000,))


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"algorithm": algorithm, "memory": memory, "large": large}


if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS))
