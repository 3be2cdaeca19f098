"""The site's pattern explorer held against the package: settings, what Python says of each, what the script is asked.

    python scripts/explorer.py    compare in Node, where that is installed

tests/test_site.py compares in Node, `make test-site` in the browser. Every number is an integer below 2**53, so both
sides have to agree exactly.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "nbs/explanations/explorer.js"
BYTES = {2: "bfloat16", 4: "float32"}
DRAWN = 96  # tokens up to which masks are compared

# What patternExplorer says of one setting, in the same form as `expected`.
EVALUATE = """(o) => {
  const x = window.patternExplorer, heads = [...Array(o.heads).keys()];
  if (x.complaint(o)) return { refused: true };
  const found = { refused: false, pairs: x.pairs(o), flops: x.flops(o), denseFlops: x.denseFlops(o),
    cache: x.cacheBytes(o), fullCache: x.fullCacheBytes(o), confined: x.confined(o) };
  found.shown = [x.flop(found.flops), x.flop(found.denseFlops), x.size(found.cache), x.size(found.fullCache)];
  if (o.n > DRAWN) return found;
  const cells = (step) => heads.map((h) => x.cells(o, h, step).map((l) => [l.branch, l.counts]));
  return { ...found, mask: cells(1), coarse: cells(o.step), reached: x.reached(o, o.token, o.layers) };
}""".replace("DRAWN", str(DRAWN))


def setting(draw: random.Random, fault: int) -> dict[str, Any]:
    "One setting as the form of the explorer would hold it; with fault 0, 1 or 2 one that is to be refused."
    branches = draw.randint(1, 4)
    kv_heads = draw.randint(1, 3)
    found = dict(
        n=draw.randint(1, DRAWN),
        lengths=[draw.randint(1, 64) for _ in range(branches)],
        rates=[draw.choice((1, 1, 2, 3, 4, 5, 8)) for _ in range(branches)],
        heads=kv_heads * draw.randint(1, 4),
        kvHeads=kv_heads,
        causal=draw.random() < 0.5,
        mixing=draw.choice(("groups", "softmax")),
        offsets=draw.choice(("blocked", "interleaved")),
        headDim=8 * draw.randint(1, 8),
        layers=draw.randint(1, 4),
        batch=draw.randint(1, 3),
        bytes=draw.choice((2, 4)),
        step=draw.randint(2, 7),
    )
    found["token"] = draw.randrange(found["n"])
    if fault == 0:
        found["lengths"].append(8)
    elif fault == 1:
        found["rates"][0] = 0
    elif fault == 2:
        found["kvHeads"] = found["heads"] + 1
    return found


def settings(count: int, seed: int = 0) -> list[dict[str, Any]]:
    "Drawn settings, and some long ones of which only the numbers are compared."
    draw = random.Random(seed)
    shape = dict(heads=12, kvHeads=4, headDim=64, layers=2, batch=1, bytes=2, step=2, token=0)
    branches = dict(lengths=[2048, 4096, 8192, 16384, 32768], rates=[1, 2, 4, 6, 12])
    kinds = [dict(mixing=m, offsets="blocked", causal=c) for m in ("groups", "softmax") for c in (True, False)]
    long = [{**shape, **branches, **kind, "n": n} for n in (2048, 32768, 100_001, 1 << 20) for kind in kinds]
    readme = dict(
        lengths=[1024, 4096], rates=[1, 4], heads=8, kvHeads=8, mixing="groups", offsets="blocked", causal=True
    )
    long += [{**shape, **readme, "layers": 1, "n": n} for n in (510, 4096)]  # at 510 a full cache has 1,020 KiB
    return [setting(draw, i % 16) for i in range(count)] + long


def confined(lengths: tuple[int, ...]) -> bool:
    "Whether no token can ever see beyond its segment of the longest branch: all others lie within such segments."
    return all(max(lengths) % w == 0 for w in lengths)


def shown(x: int, units: str, base: int) -> str:
    "A number with three digits (four from 1,000 to 1,023) and a unit, rounded as a browser rounds."

    def rounded(value: float) -> Decimal:
        found = Decimal(value)
        for _ in range(2):  # 99.96 becomes 100.0, and that 100
            found = found.quantize(Decimal(1).scaleb(min(0, found.adjusted() - 2)), ROUND_HALF_UP)
        return found

    value, names = float(x), units.split()
    while rounded(value) >= base and len(names) > 1:
        value, names = max(1.0, value / base), names[1:]
    return f"{x if names == units.split() else rounded(value)} {names[0]}"


def expected(o: dict[str, Any]) -> dict[str, Any]:
    "What the package says of a setting: masking, plotting, benchmarks and the caches that decoding would make."
    import torch

    from dilated_attention_nb.benchmarks import dilated_pairs
    from dilated_attention_nb.config import check_heads
    from dilated_attention_nb.decoding import kv_cache_bytes
    from dilated_attention_nb.longnet import LongNetConfig
    from dilated_attention_nb.masking import attention_counts, branch_heads, branch_mask
    from dilated_attention_nb.plotting import reached

    n, heads, lengths, rates = o["n"], o["heads"], tuple(o["lengths"]), tuple(o["rates"])
    try:
        config = LongNetConfig(
            embed_dim=heads * o["headDim"],
            num_layers=o["layers"],
            num_heads=heads,
            num_kv_heads=o["kvHeads"],
            segment_lengths=lengths,
            dilation_rates=rates,
            mixing=o["mixing"],
            offsets=o["offsets"],
            position="rope",
        )
        check_heads(heads, len(lengths), o["mixing"])
    except ValueError:
        return {"refused": True}
    rest = dict(is_causal=o["causal"], mixing=o["mixing"])
    drawn = n <= DRAWN
    counts = attention_counts(n, n, heads, lengths, rates, **rest, offsets=o["offsets"]) if drawn else None
    pairs = int(counts.sum()) if drawn else dilated_pairs(n, heads, lengths, rates, **rest)
    if drawn and o["offsets"] == "blocked":
        assert pairs == dilated_pairs(n, heads, lengths, rates, **rest)
    each = 4 * o["headDim"] * o["layers"] * o["batch"]
    cache = dict(batch_size=o["batch"], max_seq_len=n, dtype=getattr(torch, BYTES[o["bytes"]]))
    found = dict(
        refused=False,
        pairs=pairs,
        flops=each * pairs,
        denseFlops=each * dilated_pairs(n, heads, (n,), (1,), o["causal"]),
        cache=kv_cache_bytes(config, **cache),
        fullCache=kv_cache_bytes(config, **cache, full=True),
    )
    assert max(found.values()) < 2**53, "a browser's numbers end here"
    flop, size = "FLOP kFLOP MFLOP GFLOP TFLOP PFLOP EFLOP ZFLOP", "B KiB MiB GiB TiB PiB"
    units = dict(flops=(flop, 1000), denseFlops=(flop, 1000), cache=(size, 1024), fullCache=(size, 1024))
    found |= dict(shown=[shown(found[name], *unit) for name, unit in units.items()], confined=confined(lengths))
    if not drawn:
        return found

    def pooled(mask: torch.Tensor, step: int) -> list[list[int]]:
        fill = -n % step
        whole = torch.nn.functional.pad(mask.int(), (0, fill, 0, fill))
        return whole.unflatten(1, (-1, step)).unflatten(0, (-1, step)).sum((1, 3)).tolist()

    def cells(step: int) -> list[list]:
        masks: list[list] = [[] for _ in range(heads)]
        for g, (w, r) in enumerate(zip(lengths, rates)):
            for members, s in branch_heads(heads, g, rates, o["mixing"], o["offsets"]):
                counted = pooled(branch_mask(n, n, w, r, s, o["causal"]), step)
                for head in members:
                    masks[head].append([g, counted])
        return masks

    rows = reached(counts > 0, o["token"], o["layers"]).astype(int).tolist()
    return {**found, "mask": cells(1), "coarse": cells(o["step"]), "reached": rows}


def differences(asked: list[dict], said: list[dict]) -> list[str]:
    "Where the script says something else than the package; `said` is what EVALUATE gave for each setting."
    wrong = []
    for o, there in zip(asked, said, strict=True):
        here = expected(o)
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                short = [json.dumps(x.get(name))[:80] for x in (here, there)]
                wrong.append(f"{name}: Python says {short[0]}, the explorer {short[1]}, for {json.dumps(o)}")
    return wrong


def in_node(asked: list[dict], script: str | None = None) -> list[dict]:
    "What Node says; `script` stands for the explorer's own text."
    text = SCRIPT.read_text(encoding="utf-8") if script is None else script
    program = "globalThis.window = {}; globalThis.document = { getElementById: () => null };\n" + text
    program += f"\nconsole.log(JSON.stringify({json.dumps(asked)}.map({EVALUATE})));\n"
    done = subprocess.run([shutil.which("node") or "node", "-"], input=program, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def main() -> int:
    if not shutil.which("node"):
        print("there is no Node here; `make test-site` compares in a browser", file=sys.stderr)
        return 1
    asked = settings(200)
    wrong = differences(asked, in_node(asked))
    print("\n".join([*wrong, f"{len(asked)} settings compared, {len(wrong)} differences"]))
    return bool(wrong)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
