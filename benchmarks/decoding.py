"""Measure decoding and store the figures in benchmarks/decoding.json.

python benchmarks/decoding.py                    all sections (some five minutes on two cores)
python benchmarks/decoding.py position memory    some of them
python benchmarks/decoding.py --check kinds      store nothing; say what is worse than what is stored
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dilated_attention_nb.benchmarks import in_turn, medians, ratio, run_sections

torch.set_num_threads(1)  # a token is too little work for two

RESULTS = Path(__file__).with_name("decoding.json")
MODEL = dict(
    embed_dim=256, num_layers=4, num_heads=4, segment_lengths=(2048, 4096, 8192, 16_384), dilation_rates=(1, 2, 4, 6)
)
PHASE, WINDOW = 10_000, 16_384  # every position is measured at the same place of a window: as many keys are seen


def make() -> Any:
    from dilated_attention_nb.longnet import LongNet, LongNetConfig

    torch.manual_seed(0)
    return LongNet(LongNetConfig(**MODEL)).eval()  # type: ignore[arg-type]


@torch.no_grad()
def seconds_per_token(model: Any, caches: dict[Any, Any], count: int) -> dict[Any, list[float]]:
    "Of `count` tokens with each cache in turn, after five of warm-up; the caches are left where they were."
    tokens = iter(torch.randint(0, 256, ((count + 6) * len(caches), 1, 1)))
    runs = {name: (lambda c=cache: model(next(tokens), cache=c)) for name, cache in caches.items()}
    in_turn(runs, 4)
    found = in_turn(runs, count)
    for cache in caches.values():
        for layer in cache.layers:
            layer.rollback(count + 6)
    return found


@torch.no_grad()
def position() -> dict[str, Any]:
    "Time per token against the position, with everything before it really read."
    from dilated_attention_nb.decoding import LongNetCache

    model, rows = make(), []
    starts = [PHASE + i * WINDOW for i in (0, 1, 6, 30, 61)]
    caches: dict[int, Any] = {}
    for start in starts:
        caches[start] = LongNetCache(model.config)
        generator, begin = torch.Generator().manual_seed(0), time.perf_counter()
        while caches[start].length < start:
            piece = min(8192, start - caches[start].length)
            model.hidden(torch.randint(0, 256, (1, piece), generator=generator), cache=caches[start])
        print(start, "read in", time.perf_counter() - begin, "s", flush=True)
    found = seconds_per_token(model, caches, 200)
    for start in starts:
        row = {"position": start, "ms": medians(found)[start] * 1e3, "ratio": ratio(found, start, starts[0])}
        rows.append(row | {"cache_mib": caches[start].nbytes / 2**20})
        print(rows[-1], flush=True)
    return {"model": MODEL, "dtype": "float32", "rows": rows}


@torch.no_grad()
def kinds() -> dict[str, Any]:
    "Dilated, full with dilated attention, full attention, and no cache at all, at several positions."
    from dilated_attention_nb.decoding import LongNetCache

    model, rows = make(), []
    for start in (1_000, 4_000, 16_000, 64_000):
        tokens = torch.randint(0, 256, (1, start + 40))
        caches = {
            "slots that are still seen": LongNetCache(model.config),
            "everything, dilated attention": LongNetCache(model.config, 1, start + 40, full=True),
            "everything, full attention": LongNetCache(model.config, 1, start + 40, full=True),
        }
        for layer in caches["everything, full attention"].layers:
            layer.config = None
        for name, cache in caches.items():
            for layer in cache.layers:  # what is in it makes no difference to the time
                for x in (
                    [layer._k, layer._v] if name != "slots that are still seen" else [b.k for b in layer._branches]
                ):
                    x.normal_()
                layer.length = start
        row: dict[str, Any] = {"position": start}
        seconds = medians(seconds_per_token(model, caches, 34))
        seconds |= medians(in_turn({"no cache": lambda x=tokens[:, :start]: model.hidden(x)}, 0))
        row |= {name: s * 1e3 for name, s in seconds.items()}
        slots, everything, *_ = seconds.values()
        rows.append(row | {"ratio": slots / everything})
        print(row, flush=True)
    return {"model": MODEL, "dtype": "float32", "rows": rows}


def decode_many(count: int) -> None:
    "Read `count` tokens, 25 at a time."
    from dilated_attention_nb.decoding import LongNetCache

    model = make()
    cache, read = LongNetCache(model.config), torch.randint(0, 256, (1, 25))
    with torch.no_grad():
        for _ in range(count // 25):
            model(read, cache=cache)


def memory() -> dict[str, Any]:
    "Peak of a process that decodes."
    from decoding import decode_many as importable

    from dilated_attention_nb.processes import peak_memory

    rows = []
    for count in (20_000, 100_000):
        rows.append({"tokens": count, "peak_mib": peak_memory(importable, count, timeout_s=3000).peak / 2**20})
        print(rows[-1], flush=True)
    return {"model": MODEL, "rows": rows}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"position": position, "kinds": kinds, "memory": memory}


if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS))
