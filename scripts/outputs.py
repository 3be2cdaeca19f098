"""What a notebook stores against what a run of it shows: used by `notebooks.py --check` and `run_notebooks_tests.py`.

Text must be equal, numbers in it to within what rounding explains, figures to within what such numbers move in them:

- Integers are equal. Other numbers differ by at most one unit of the last digit that is printed, as both are rounded,
  plus `RELATIVE` of their size: two float32 sums of 4,096 terms, each in an order of its own, are off by about
  sqrt(4096) rounding errors of 2^-24 each, and so differ by at most 2^-17.
- Figures have the same size, and no channel of any pixel differs by more than `LEVELS` of 255. On axes of 500 pixels
  `RELATIVE` moves an edge by 0.004 pixels, which changes its smoothed pixels by 1; 8 is an edge moved by 1/32 pixel.
- Streams are compared whole, then figures and other displays in their order, then the value of the last line. What goes
  to stderr is not compared: `notebooks.py` refuses to store it.

A cell that begins with `#| varies time` or `#| varies machine` shows times, or what depends on the machine (kernels
that are there, rounding errors themselves). Of it only the kinds of its outputs are compared.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RELATIVE = 2 * math.sqrt(4096) * 2.0**-24
LEVELS = 8
REASONS = ("time", "machine")
VARIES = re.compile(r"^#\|\s*varies\b(.*)$", re.MULTILINE)
ADDRESS = re.compile(r"(<.*?) at 0x[0-9a-fA-F]+(>)")
NUMBER = re.compile(r" *(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")  # with the spaces that align it


def environment() -> dict[str, str]:
    "Settings that make two runs alike; what the caller has set (thread counts) stays."
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    fixed = dict(PYTHONPATH=path, PYTHONHASHSEED="0", JUPYTER_PREFER_ENV_PATH="1", PYDEVD_DISABLE_FILE_VALIDATION="1",
                 MPLBACKEND="module://matplotlib_inline.backend_inline", COLUMNS="120", NO_COLOR="1")  # fmt: skip
    # sums in another order differ in their last digits: one thread stores the same on every machine
    return {"OMP_NUM_THREADS": "1", **os.environ, **fixed}


def text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def plain(printed: str) -> str:
    "Without the addresses of objects, as nbdev stores it."
    return ADDRESS.sub(r"\1\2", printed)


def marker(source: str | list[str]) -> str | None:
    "The reason that a cell gives for outputs that vary; None if they may not."
    found = VARIES.search(text(source))
    return found[1].strip() if found else None


def misused(cell: dict) -> str | None:
    "What is wrong with a cell's marker."
    reason = marker(cell["source"])
    if reason is None:
        return None
    if reason not in REASONS:
        return f"`#| varies {reason}`; say `#| varies` and one of {', '.join(REASONS)}"
    if not cell.get("outputs"):
        return f"`#| varies {reason}` on a cell without output; remove it"
    return None


def unit(number: str) -> float:
    "What one more in the last printed digit adds."
    digits, _, power = number.lower().partition("e")
    return 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))


def close(one: str, other: str) -> bool:
    "Do two numbers agree, as they are printed?"
    if not any(c in "." or c in "eE" for c in one + other):
        return int(one) == int(other)
    a, b = float(one), float(other)
    return a == b or abs(a - b) <= 1.001 * min(unit(one), unit(other)) + RELATIVE * max(abs(a), abs(b))


def text_difference(stored: str, found: str) -> str | None:
    "Where two texts differ, if they do."
    for number, (one, other) in enumerate(zip(stored.splitlines(), found.splitlines()), 1):
        if one == other:
            continue
        same = NUMBER.split(one) == NUMBER.split(other)
        if not same or not all(map(close, map(str.strip, NUMBER.findall(one)), map(str.strip, NUMBER.findall(other)))):
            return f"line {number}: stored {one[:200]!r}, now {other[:200]!r}"
    one, other = len(stored.splitlines()), len(found.splitlines())
    return None if one == other else f"stored {one} lines, now {other}"


def picture_difference(stored: str, found: str) -> str | None:
    "How far two PNG pictures, in base64, are apart, if that is too far."
    if stored.strip() == found.strip():
        return None
    one, other = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")).astype(int)
        for data in (stored, found)
    )
    if one.shape != other.shape:
        return "stored {1} x {0} pixels, now {3} x {2}".format(*one.shape[:2], *other.shape[:2])
    apart = np.abs(one - other).max(-1)
    if apart.max() <= LEVELS:
        return None
    return f"{(apart > LEVELS).sum()} of {apart.size} pixels differ, by up to {apart.max()} of 255 (allowed: {LEVELS})"


def parts(outputs: Iterable[dict]) -> list[tuple[str, dict]]:
    "Outputs as `(kind, {MIME type: content})`: what was printed, then displays, then the value of the last line."
    outputs = list(outputs)
    printed = plain("".join(text(out["text"]) for out in outputs if out.get("name") == "stdout"))
    found = [("printed text", {"text/plain": printed})] if printed else []
    for output_type, kind in (("display_data", "display"), ("execute_result", "value"), ("error", "error")):
        for out in outputs:
            if out["output_type"] == output_type:
                data = {k: plain(text(v)) if k.startswith("text/") else v for k, v in out.get("data", {}).items()}
                found.append(("figure" if "image/png" in data else kind, data))
    return found


def differences(stored: dict, found: Iterable[dict]) -> list[str]:
    "How the outputs `found` in a run differ from those of the `stored` cell."
    found = list(found)
    if wrong := misused({**stored, "outputs": stored.get("outputs") or found}):
        return [wrong]
    before, after = parts(stored.get("outputs", [])), parts(found)
    kinds, now = ([(kind, sorted(data)) for kind, data in some] for some in (before, after))
    if kinds != now:
        said = (", ".join(kind for kind, _ in some) or "nothing" for some in (kinds, now))
        shown = "" if kinds else ": " + repr(after[0][1].get("text/plain", "")[:200])
        return ["stored {}, now {}".format(*said) + shown]
    if marker(stored["source"]) is not None:
        return []
    wrong = []
    for (kind, one), (_, other) in zip(before, after):
        for mime, content in one.items():
            if isinstance(content, dict):  # JSON
                difference = None if content == other[mime] else f"stored {content}, now {other[mime]}"
            else:
                compare = picture_difference if mime == "image/png" else text_difference
                difference = compare(text(content), text(other[mime]))
            wrong += [f"{kind}, {difference}"] if difference else []
    return wrong
