"""Write README.md from index.ipynb, with its pictures under images/.

    python scripts/readme.py            write them
    python scripts/readme.py --check    fail if they are not what would be written

It takes the stored outputs and runs nothing. Cell directives count as on the site: `#| hide`, `#| echo: false`,
`#| output: false`, and `#| label: fig-name`, which names a picture. Directives are left out of the code shown.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written by `make export` from index.ipynb: edit that. -->"
DIRECTIVE = re.compile(r"^\s*#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
HIDDEN = {"hide", "default_exp", "exporti"}


def text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def directives(source: str) -> tuple[dict[str, str], str]:
    "The `#|` lines of a cell, and the source without them."
    found, rest = {}, []
    for line in source.splitlines():
        if match := DIRECTIVE.match(line):
            found[match[1]] = match[2]
        else:
            rest.append(line)
    return found, "\n".join(rest).strip("\n")


def fence(body: str, language: str = "") -> str:
    "A fenced block, with more backticks than any run of them inside."
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", body)), default=0))
    return f"{ticks}{language}\n{body}\n{ticks}"


def output_blocks(out: dict, name: str, alt: str, images: dict[str, bytes]) -> list[str]:
    "The blocks that show one stored output; pictures are added to `images`."
    if out["output_type"] == "stream":
        return [fence(text(out["text"]).rstrip("\n"))] if out["name"] == "stdout" else []
    data = out.get("data", {})
    if "image/png" in data:
        file = f"images/readme-{name}.png"
        if file in images:
            file = f"images/readme-{name}-{sum(f.startswith(f'images/readme-{name}') for f in images) + 1}.png"
        images[file] = base64.b64decode(text(data["image/png"]))
        return [f"![{alt}]({file})"]
    if "text/markdown" in data:
        return [text(data["text/markdown"]).strip("\n")]
    return [fence(text(data["text/plain"]).rstrip("\n"))] if "text/plain" in data else []


def render(notebook: dict) -> tuple[str, dict[str, bytes]]:
    "The README's text, and its pictures by path."
    blocks, images = [NOTE], {}
    for cell in notebook["cells"]:
        source = text(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source.strip("\n"))
        if cell["cell_type"] != "code":
            continue
        found, code = directives(source)
        if HIDDEN & found.keys() or found.get("include") == "false":
            continue
        if code and found.get("echo") != "false":
            blocks.append(fence(code, "python"))
        if found.get("output") != "false":
            name = found.get("label", cell["id"]).removeprefix("fig-")
            alt = found.get("fig-alt", found.get("fig-cap", name)).strip("\"'")
            for out in cell.get("outputs", []):
                blocks += output_blocks(out, name, alt, images)
    return "\n\n".join(block for block in blocks if block) + "\n", images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README.md or its pictures differ")
    args = parser.parse_args()
    readme, images = render(json.loads((ROOT / "index.ipynb").read_text(encoding="utf-8")))
    wanted = {"README.md": readme.encode(), **images}
    stale = [p for p in (ROOT / "images").glob("readme-*.png") if p.relative_to(ROOT).as_posix() not in images]
    differ = [name for name, data in wanted.items() if not (ROOT / name).exists() or (ROOT / name).read_bytes() != data]
    if args.check:
        for name in [*differ, *(p.relative_to(ROOT).as_posix() for p in stale)]:
            print(f"{name} is not what index.ipynb makes: run `make export`", file=sys.stderr)
        return 1 if differ or stale else 0
    for name in differ:
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(wanted[name])
    for path in stale:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
