"""Open every page of the built site in headless Chromium and say what a reader would stumble over.

    python scripts/check_site.py                   build what is missing or older, then check _docs/
    python scripts/check_site.py --site FOLDER     check that folder as it is
    python scripts/check_site.py --shots FOLDER    write pictures of the pages there as well, to be looked at

Each page: nothing said on the console as an error, no request that fails or leaves the machine, links and fragments
and images that lead somewhere, a description for each image, no sideways scrolling on a phone or a desk, text that is
large and dark enough in light and dark mode. The site: search, the path from the first page to the last, the stored
theme, and the pattern explorer held against the package (scripts/explorer.py). Needs Chromium: Debian's package
chromium, or CHROMIUM=path. What belongs to the preview alone (search, path, theme, contrast) is not asked of a site by
Quarto, and of its controls only those on the page itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import explorer

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SMALLEST = 11.0  # CSS pixels of the smallest text

PROBES = Path(__file__).with_suffix(".js")  # what is asked of a page, as functions of `siteCheck`


@dataclass
class Report:
    "What was found: of each page what is on it, and what is wrong with it."

    pages: dict[str, dict[str, Any]] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, place: str, *what: str) -> None:
        self.wrong.setdefault(place, []).extend(what)


def find_chromium() -> str:
    "The browser's program, or one sentence on what is missing."
    given = os.environ.get("CHROMIUM")
    found = given if given else next(filter(None, map(shutil.which, NAMES)), None)
    if not found or not shutil.which(found):
        raise SystemExit(
            f"the site is checked in Chromium, and there is no {given or 'chromium'} here: "
            "install it (Debian: apt-get install chromium) or name its program, CHROMIUM=path"
        )
    return found


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    "The folder at an address of this machine."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def find_pages(site: Path) -> list[str]:
    "The pages by their places in the site."
    return sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html") if "site_libs" not in p.parts)


# ---- in the browser -------------------------------------------------------------------------------------------------


class Listener:
    "Collects what a page does that it should not."

    def __init__(self, page: Any, home: str) -> None:
        self.heard: list[str] = []
        page.on("console", lambda m: m.type in ("error", "warning") and self.heard.append(f"console: {m.text}"))
        page.on("pageerror", lambda error: self.heard.append(f"error in a script: {error}"))
        page.on("requestfailed", lambda r: self.heard.append(f"request failed: {r.url[:120]}"))
        page.on("response", lambda r: r.status >= 400 and self.heard.append(f"answer {r.status}: {r.url[:120]}"))
        page.on("request", lambda r: self.outside(r.url, home))

    def outside(self, url: str, home: str) -> None:
        if not url.startswith((home, "data:", "blob:", "about:")):
            self.heard.append(f"asks another host: {url[:120]}")


async def visit(page: Any, home: str, place: str, report: Report, preview: bool, shots: Path | None) -> None:
    "One page on a phone and on a desk, light and dark."
    listener = Listener(page, home)
    await page.set_viewport_size(PHONE)
    await page.goto(home + place, wait_until="load")
    facts = await page.evaluate("siteCheck.facts()")
    report.pages[place] = facts
    found: list[str] = []
    nameless = [what for what, ours in facts["nameless"] if preview or ours]

    async def shot(name: str) -> None:
        if shots:
            await page.screenshot(path=shots / f"{place.replace('/', '__')}-{name}.png", full_page=True)

    async def look(name: str, colours: bool) -> None:
        found.extend(f"{name}: scrolls sideways: {what}" for what in await page.evaluate("siteCheck.wide()"))
        if colours:
            found.extend(f"{name}: {what}" for what in await page.evaluate(f"siteCheck.pale({SMALLEST})"))
        await shot(name)

    await look("phone", False)
    if preview:
        await page.click("#site-menu")
        if not await page.is_visible("#site-pages a[aria-current=page]"):
            found.append("phone: the menu does not show where one is")
        await page.click("#site-menu")
    await page.set_viewport_size(DESK)
    await look("light", preview)
    if preview:
        await page.click("#site-theme")
        if await page.evaluate("document.documentElement.dataset.theme") != "dark":
            found.append("the button does not make the page dark")
        await look("dark", True)
        await page.evaluate("localStorage.clear()")
    found += [f"image without a description: {i['src']}" for i in facts["images"] if not (i["alt"] or "").strip()]
    found += [f"image not drawn: {i['src']}" for i in facts["images"] if not i["drawn"]]
    found += [f"a link that is shown as Markdown: {what[:80]}" for what in facts["raw"]]
    found += ["a drawing without a description"] * facts["drawings"]
    found += [f"a control without a name: {what}" for what in nameless]
    found += [] if facts["title"].strip() else ["no title"]
    found += headings(facts["heads"]) if preview else []
    twice = sorted({x for x in facts["ids"] if facts["ids"].count(x) > 1})
    found += [f"two elements are called #{x}" for x in twice]
    report.add(place, *found, *listener.heard)


def headings(heads: list[list]) -> list[str]:
    "One first heading, and no level left out on the way down."
    levels = [level for level, _ in heads]
    wrong = [] if levels.count(1) == 1 and levels[0] == 1 else [f"{levels.count(1)} first headings, not one at the top"]
    for (a, _), (b, text) in zip(heads, heads[1:]):
        if b > a + 1:
            wrong.append(f"heading {text!r} is of level {b} below one of level {a}")
    return wrong


async def ask_site(browser: Any, home: str, report: Report) -> None:
    "What only a reader who clicks finds out: search, theme."
    context = await browser.new_context(viewport=DESK)
    page = await context.new_page()
    listener = Listener(page, home)
    deep = next((p for p in report.pages if p.count("/") > 1), "index.html")
    for place in ("index.html", deep):
        await page.goto(home + place)
        title = report.pages[place]["title"]
        await page.click("#site-search")
        await page.wait_for_function("window.SEARCH")
        await page.fill("#site-search", title)
        if not await page.is_visible("#site-results a"):
            report.add(place, "typing this page's own title into the search shows nothing")
            continue
        await page.keyboard.press("Escape")
        if await page.is_visible("#site-results"):
            report.add(place, "Escape does not close the results")
        await page.fill("#site-search", "no_such_word_anywhere")
        if await page.is_visible("#site-results"):
            report.add(place, "search finds a word that is not there")
        await page.fill("#site-search", title)
        await page.click("#site-results a")
        await page.wait_for_load_state()
        if page.url.split("#")[0] not in [home + p for p in report.pages]:
            report.add(place, f"a result leads to {page.url}")
    await page.goto(home + "index.html")
    await page.click("#site-search")
    await page.wait_for_function("window.SEARCH")
    for place, facts in report.pages.items():
        urls = await page.evaluate("(text) => window.siteSearch(text).map((x) => x.url)", facts["title"])
        if place not in [url.split("#")[0] for url in urls]:
            report.add(place, f"search for {facts['title']!r} does not find this page")
    entries = await page.evaluate("window.SEARCH.map((x) => x.url)")
    for url in entries:
        place, _, anchor = url.partition("#")
        if place not in report.pages or unquote(anchor) not in report.pages[place]["ids"]:
            report.add("search-index.js", f"{url} leads nowhere")
    await page.goto(home + "index.html")
    await page.click("#site-theme")
    await page.goto(home + deep)
    if await page.evaluate("document.documentElement.dataset.theme") != "dark":
        report.add(deep, "dark mode is forgotten on the way to the next page")
    report.add("index.html", *listener.heard)
    await context.close()
    context = await browser.new_context(viewport=DESK, color_scheme="dark")
    page = await context.new_page()
    await page.goto(home + "index.html")
    if await page.evaluate("document.documentElement.dataset.theme") != "dark":
        report.add("index.html", "a reader whose system is dark gets a light page")
    await context.close()


async def ask_explorer(browser: Any, home: str, place: str, report: Report, count: int) -> None:
    "The explorer says what the package says, and its form does what it is for."
    context = await browser.new_context(viewport=DESK)
    page = await context.new_page()
    listener = Listener(page, home)
    await page.goto(home + place)
    asked = explorer.settings(count)
    said = await page.evaluate(f"(all) => all.map({explorer.EVALUATE})", asked)
    wrong = await asyncio.to_thread(explorer.differences, asked, said)
    report.add(place, *wrong[:10], *([f"and {len(wrong) - 10} more differences"] if len(wrong) > 10 else []))
    report.notes.append(f"the explorer and the package agree on {len(asked)} settings" if not wrong else "")
    numbers = "document.querySelector('#explorer-numbers')?.textContent"
    before = await page.evaluate(numbers)
    await page.select_option("#explorer-preset", index=2)
    after = await page.evaluate(numbers)
    if not before or not after or before == after:
        report.add(place, "another preset changes no number")
    drawn = await page.evaluate("document.querySelectorAll('#explorer-mask rect').length")
    if drawn < 10:
        report.add(place, "the mask is not drawn")
    await page.fill("#explorer-rates", "1, 2")
    if not await page.is_visible("#explorer [role=alert]"):
        report.add(place, "a wrong setting brings no complaint")
    await page.select_option("#explorer-preset", index=0)
    if await page.is_visible("#explorer [role=alert]") or not await page.is_visible("#explorer-reach"):
        report.add(place, "a good setting does not bring the pictures back")
    for lengths, said in (("1000, 1500", "Not every"), ("500, 1500", "Every")):
        for name, value in dict(lengths=lengths, rates="1, 1", n="3000", token="2999").items():
            await page.fill(f"#explorer-{name}", value)
        if said not in (await page.text_content("#explorer-limit") or ""):
            report.add(place, f"how far information travels with segments of {lengths} is told wrong")
    report.add(place, *listener.heard)
    await context.close()


# ---- without the browser --------------------------------------------------------------------------------------------


def check_links(report: Report, site: Path, git: str) -> None:
    "Every link of a page leads to a page, a fragment or a file; those to this repository too."
    for place, facts in report.pages.items():
        for target in sorted({link["to"] for link in facts["links"]}):
            if target.startswith(git):
                report.add(place, *repository_link(target, git))
                continue
            parts = urlsplit(urljoin("site:///" + place, target)) if not urlsplit(target).scheme else urlsplit(target)
            if parts.scheme in ("https", "mailto", "http"):
                if parts.scheme == "http":
                    report.add(place, f"a link that is not encrypted: {target}")
                continue
            there = unquote(urlsplit(urljoin("http://site/" + place, target)).path).lstrip("/")
            there = there + "index.html" if not there or there.endswith("/") else there
            if not (site / there).is_file():
                report.add(place, f"link to {target}: there is no {there}")
            elif parts.fragment and there in report.pages:
                if unquote(parts.fragment) not in report.pages[there]["ids"]:
                    report.add(place, f"link to {target}: nothing there is called #{parts.fragment}")


def repository_link(target: str, git: str) -> list[str]:
    "A link into the repository names a file that is here, and a line that it has."
    match = re.fullmatch(r"/(?:blob|tree)/[^/]+/([^#]+)(?:#L(\d+))?.*", target[len(git) :])
    if not match:
        return []
    path = ROOT / match[1]
    if not path.exists():
        return [f"link to {target}: the repository has no {match[1]}"]
    if match[2] and int(match[2]) > len(path.read_text(encoding="utf-8").splitlines()):
        return [f"link to {target}: {match[1]} is shorter"]
    return []


def check_path(report: Report) -> None:
    "From the first page, next leads to every page once, and previous leads back."
    follows = {}
    for place, facts in report.pages.items():
        for link in facts["links"]:
            if link["rel"] in ("next", "prev"):
                there = unquote(urlsplit(urljoin("http://site/" + place, link["to"])).path).lstrip("/")
                follows[place, link["rel"]] = there
    path = ["index.html"]
    while (after := follows.get((path[-1], "next"))) and after not in path:
        path.append(after)
    if missed := sorted(report.pages.keys() - set(path)):
        report.add("index.html", f"the path of next pages ends at {path[-1]} and misses {', '.join(missed)}")
    for a, b in zip(path, path[1:]):
        if follows.get((b, "prev")) != a:
            report.add(b, f"the page before is {a}, and previous leads to {follows.get((b, 'prev'))}")


async def run(site: Path, workers: int, count: int, shots: Path | None) -> Report:
    "Check a site."
    from playwright.async_api import async_playwright

    report = Report()
    places = find_pages(site)
    if "index.html" not in places:
        raise SystemExit(f"there is no index.html in {site}")
    preview = (site / "preview.js").exists()
    if not preview:
        report.notes.append(
            "by Quarto: search, reading order and themes with their contrast are its own and were not checked"
        )
    git = re.search(r"^git_url\s*=\s*(\S+)", (ROOT / "settings.ini").read_text(), re.MULTILINE)
    with served(site) as home:
        async with async_playwright() as playwright:
            options = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # no page leaves this machine
            options += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
            browser = await playwright.chromium.launch(executable_path=find_chromium(), args=options)
            todo = sorted(places, key=lambda p: -(site / p).stat().st_size)

            async def work() -> None:
                context = await browser.new_context(color_scheme="light")
                await context.add_init_script(path=PROBES)
                while todo:
                    place, page = todo.pop(0), await context.new_page()
                    try:
                        await visit(page, home, place, report, preview, shots)
                    except Exception as error:  # of one page: the others are looked at all the same
                        report.add(place, f"could not be looked at: {error}")
                    await page.close()
                await context.close()

            await asyncio.gather(*(work() for _ in range(workers)))
            report.pages = {place: report.pages[place] for place in places if place in report.pages}
            if preview and "index.html" in report.pages:  # else it is among what is wrong
                await ask_site(browser, home, report)
            for place in [p for p in places if p.endswith("explorer.html")]:
                await ask_explorer(browser, home, place, report, count)
            await browser.close()
    check_links(report, site, git[1] if git else "")
    if preview:
        check_path(report)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, help="a folder to check as it is")
    parser.add_argument("--shots", type=Path, help="a folder for pictures of the pages")
    parser.add_argument("--workers", type=int, default=4, help="pages looked at at a time")
    parser.add_argument("--settings", type=int, default=100, help="settings of the explorer that are drawn")
    args = parser.parse_args()
    find_chromium()
    site = args.site or ROOT / "_docs"
    if not args.site:
        subprocess.run([sys.executable, str(ROOT / "scripts/docs.py")], check=True)
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    start = time.time()
    report = asyncio.run(run(site.resolve(), args.workers, args.settings, args.shots))
    for place, what in sorted(report.wrong.items()):
        for line in dict.fromkeys(what):
            print(f"{place}: {line}")
    for note in filter(None, report.notes):
        print(note)
    failed = sum(bool(what) for what in report.wrong.values())
    print(f"{len(report.pages)} pages in {time.time() - start:.0f} s")
    print(f"{len(report.pages.keys() | report.wrong.keys()) - failed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
