"""Execute notebooks and store their outputs, byte for byte the same whenever nothing changed.

    python scripts/notebooks.py                        all notebooks
    python scripts/notebooks.py nbs/01_config.ipynb    some of them
    python scripts/notebooks.py --check                execute, name what differs from what is stored, write nothing

Every notebook runs in a fresh kernel, in its own folder, with fixed hash and figure settings. What would change from
run to run is removed (execution counts, timings, kernel versions, PNG comments, `at 0x7f..` in object names) or, where
removing it would falsify the output, refused (stray addresses, paths of this machine, stderr, widgets): the notebook is
then left as it was. Cells marked `#| eval: false` keep the outputs that they have. So do cells whose new outputs agree
with the stored ones (`outputs.py` says what that means), so that another machine's rounding changes no file.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import struct
import sys
import time
from pathlib import Path

import nbformat
from execnb.nbio import dict2nb, nb2str
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import clean_nb
from outputs import differences, environment, marker, text

ROOT = Path(__file__).resolve().parent.parent
SKIP_TAG = "keep-outputs"
EVAL_FALSE = re.compile(r"^\s*#\|\s*eval:\s*false\s*$", re.MULTILINE | re.IGNORECASE)
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{8,}\b")
WIDGET = "application/vnd.jupyter.widget-view+json"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
PNG_COMMENTS = {b"tEXt", b"zTXt", b"iTXt", b"tIME", b"eXIf"}


def find_notebooks(root: Path = ROOT) -> list[Path]:
    "All notebooks of the repository, in reading order: the numbered ones, then the index that shows their results."
    found = [p for p in root.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(root).parts)]
    return sorted(found, key=lambda p: (p.parent == root, p.relative_to(root).as_posix()))


def plain_png(data: str) -> str:
    "The same picture without comments (writing program, date), so that it depends on its pixels alone."
    raw = base64.b64decode(data)
    if not raw.startswith(PNG_HEAD):
        return data
    out, at = [PNG_HEAD], len(PNG_HEAD)
    while at < len(raw):
        size = struct.unpack(">I", raw[at : at + 4])[0] + 12  # length, type and checksum around the payload
        if raw[at + 4 : at + 8] not in PNG_COMMENTS:
            out.append(raw[at : at + size])
        at += size
    return base64.b64encode(b"".join(out)).decode()


def settle(outputs: list[dict]) -> list[dict]:
    "Join neighbouring pieces of one stream and make pictures plain: how often a kernel flushes is chance."
    done: list[dict] = []
    for out in outputs:
        if out["output_type"] == "stream" and done and done[-1].get("name") == out["name"]:
            done[-1]["text"] = text(done[-1]["text"]) + text(out["text"])
            continue
        data = out.get("data", {})
        if "image/png" in data:
            data["image/png"] = plain_png(text(data["image/png"]))
        done.append(dict(out))
    for out in done:  # as lists of lines, the way Jupyter stores them
        if out["output_type"] == "stream":
            out["text"] = text(out["text"]).splitlines(keepends=True)
        for kind, value in out.get("data", {}).items():
            if kind.startswith("text/") and isinstance(value, str):
                out["data"][kind] = value.splitlines(keepends=True)
    return done


def complaints(cell: dict) -> list[str]:
    "What in a cell's outputs would differ on the next run or on another machine."
    here = {
        str(ROOT): "the repository's path",
        str(Path.home()): "the home folder",
        sys.prefix: "the environment's path",
    }
    found = []
    for out in cell.get("outputs", []):
        if out["output_type"] == "error":
            found.append(f"a stored error ({out.get('ename')}); catch it and show the message")
        if out.get("name") == "stderr":
            found.append("it writes to stderr (warnings, logs, progress bars); mend, capture or silence this: "
                         + text(out["text"]).strip()[:300])  # fmt: skip
        if WIDGET in out.get("data", {}):
            found.append("a widget, which has no stored form; print plain text instead")
        parts = [text(v) for k, v in out.get("data", {}).items() if k.startswith("text/")] + [text(out.get("text", ""))]
        for part in parts:
            if hit := ADDRESS.search(part):
                found.append(f"an object address ({hit[0]}), different in every run")
            found += [f"{what} ({path}), different on every machine" for path, what in here.items()
                      if len(path) > 4 and path in part]  # fmt: skip
    return found


def clean(nb: dict) -> str:
    "The text to store: exactly what `nbdev_clean` would leave."
    nb = dict2nb(nb)
    clean_nb(nb)
    return nb2str(nb)


def execute(path: Path, timeout: int) -> tuple[str, list[str], list[str]]:
    "Run the notebook at `path`: the text to store, the complaints about it, what differs from what is stored."
    nb = nbformat.read(path, as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    before = [cell.outputs for cell in code]
    for cell in code:
        if EVAL_FALSE.search(cell.source):
            cell.metadata["tags"] = [SKIP_TAG]
        else:
            cell.outputs = []
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # errors only: the kernel's own notes are no output
        skip_cells_with_tag=SKIP_TAG,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=environment())
    for cell in code:
        cell.outputs = [nbformat.from_dict(out) for out in settle(cell.outputs)]
    cleaned = nbformat.reads(clean(nb), as_version=4).cells  # judged as it will stand there: `<f at 0x..>` is `<f>`
    stored, bad, differ = iter(before), [], []
    for number, (cell, new) in enumerate(zip(nb.cells, cleaned), 1):
        if cell.cell_type != "code":
            continue
        where, outputs = f"cell {number} ({new.id}): ", next(stored)
        bad += [where + why for why in complaints(new)]
        found = differences({"source": new.source, "outputs": outputs}, new.outputs)
        differ += [where + why for why in found]
        if not found and marker(new.source) is None:
            cell.outputs = [nbformat.from_dict(out) for out in settle(outputs)]
    return clean(nb), bad, differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stored outputs differ")
    parser.add_argument("--timeout", type=int, default=900, help="seconds that one cell may take (default 900)")
    args = parser.parse_args()
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this environment, not one of the user's
    paths = [p.resolve() for p in args.notebooks] or find_notebooks()
    if not paths:
        print("no notebooks found", file=sys.stderr)
        return 1
    failed = changed = 0
    for path in paths:
        name = os.path.relpath(path, ROOT)
        start = time.time()
        try:
            new, found, differ = execute(path, args.timeout)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"{name}: FAILED\n{error}", file=sys.stderr)
            failed += 1
            continue
        if found:
            print(f"{name}: REFUSED, outputs would not be the same again:\n  " + "\n  ".join(found), file=sys.stderr)
            failed += 1
            continue
        differs = bool(differ) if args.check else path.read_text(encoding="utf-8") != new
        changed += differs
        if differs and not args.check:
            part = path.with_suffix(".ipynb.part")  # complete or absent: an interruption leaves the old notebook
            part.write_text(new, encoding="utf-8")
            os.replace(part, path)
        word = ("differs" if args.check else "stored") if differs else "unchanged"
        print(f"{name}: {word} ({time.time() - start:.0f} s, {len(new) / 1000:.0f} KB)")
        if differ:
            print("  " + "\n  ".join(differ))
    print(f"{len(paths)} notebooks: {len(paths) - failed - changed} unchanged, {changed} "
          f"{'differ' if args.check else 'stored'}, {failed} failed")  # fmt: skip
    return 1 if failed or (args.check and changed) else 0


if __name__ == "__main__":
    sys.exit(main())
