// What check_site.py asks of a page.
window.siteCheck = (() => {
  "use strict";

  // what is on the page
  function facts() {
    const all = (selector) => [...document.querySelectorAll(selector)];
    const above = (e) => all("main h1, main h2, main h3, main h4").findLast((h) => h.compareDocumentPosition(e) & 4)?.textContent;
    const named = (e) => e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.[0]?.textContent.trim();
    return {
      title: document.title,
      heads: all("main h1, main h2, main h3, main h4").map((h) => [+h.tagName[1], h.textContent.trim()]),
      raw: [...(document.querySelector("main")?.textContent.matchAll(/\S*\]\([^\s()]*\.(?:html|ipynb|qmd|md)\b\S*/g) || [])].map(String),
      ids: all("[id], a[name]").map((e) => e.id || e.name),
      links: all("a[href]").map((a) => ({ to: a.getAttribute("href"), rel: a.rel })),
      images: [...document.images].map((i) => ({
        src: (i.getAttribute("src") || "").replace(/^data:.*/, "a figure") + ` below "${(above(i) || "").replace("¶", "")}"`,
        alt: i.getAttribute("alt"),
        drawn: i.complete && i.naturalWidth > 0,
      })),
      drawings: all("main svg").filter((s) => !s.getAttribute("aria-label") && s.getAttribute("aria-hidden") !== "true").length,
      nameless: all("button, input, select, textarea").filter((e) => !named(e)).map((e) => [e.outerHTML.slice(0, 80), !!e.closest("main")]),
    };
  }

  // what makes the page scroll sideways; boxes that scroll by themselves may hold what is as wide as it likes
  function wide() {
    const page = document.documentElement, edge = page.clientWidth;
    if (page.scrollWidth <= edge) return [];
    const boxed = (e) => e && e !== document.body && (getComputedStyle(e).overflowX !== "visible" || boxed(e.parentElement));
    const beyond = [...document.body.querySelectorAll("*")].filter((e) => e.getBoundingClientRect().right > edge + 1 && !boxed(e));
    return [`${page.scrollWidth} pixels wide`, ...beyond.slice(0, 3).map((e) => e.outerHTML.slice(0, 90))];
  }

  const rgba = (text) => { const x = text.match(/[\d.]+/g).map(Number); return [...x.slice(0, 3), x[3] ?? 1]; };
  const over = (a, b) => [...[0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])), 1];
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, k, i) => sum + k * linear(c[i] / 255), 0);

  // text that is too pale (WCAG 2.2, 1.4.3: 4.5, or 3 where it is large) or too small, once for each pair of colours
  function pale(smallest) {
    const papers = new Map(), found = new Map(), seen = new Set();
    const paper = (e) => {
      if (!e) return [255, 255, 255, 1];
      if (!papers.has(e)) {
        const own = rgba(getComputedStyle(e).backgroundColor);
        papers.set(e, own[3] === 1 ? own : over(own, paper(e.parentElement)));
      }
      return papers.get(e);
    };
    const opacity = (e) => (e ? +getComputedStyle(e).opacity * opacity(e.parentElement) : 1);
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const e = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
      if (!text || seen.has(e) || e.closest("script, style, noscript, option, :disabled")) continue;
      seen.add(e);
      if (!e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
      const style = getComputedStyle(e), size = parseFloat(style.fontSize), where = `${e.localName} "${text.slice(0, 30)}"`;
      const back = paper(e), ink = rgba(style.color), front = over([...ink.slice(0, 3), ink[3] * opacity(e)], back);
      const [bright, dark] = [light(front), light(back)].sort((x, y) => y - x), ratio = (bright + 0.05) / (dark + 0.05);
      const need = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700) ? 3 : 4.5;
      if (ratio < need) found.set(`${style.color} on ${back}`, `contrast ${ratio.toFixed(2)}, not ${need}: ${where}`);
      if (size < smallest && !e.closest("math, sup, sub")) found.set(size, `text of ${size.toFixed(1)} pixels: ${where}`);
    }
    return [...found.values()];
  }

  return { facts, wide, pale };
})();
