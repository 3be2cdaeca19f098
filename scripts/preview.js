// The preview's theme, menu and search; no page needs it to be read.
(function () {
  "use strict";
  const up = document.currentScript.dataset.up, system = matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
  const stored = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const apply = () => (root.dataset.theme = stored() || (system.matches ? "dark" : "light"));
  apply();
  system.addEventListener("change", apply);

  // every word must occur; headings and titles count most
  function find(query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const rated = (window.SEARCH || []).map((entry) => {
      const head = entry.head.toLowerCase(), page = entry.page.toLowerCase(), text = entry.text.toLowerCase();
      if (!words.length || !words.every((w) => head.includes(w) || page.includes(w) || text.includes(w))) return [0, entry];
      return [words.reduce((sum, w) => sum + (head === w ? 20 : 0) + (head.includes(w) ? 8 : 0) + (page.includes(w) ? 3 : 0) + 1, 0), entry];
    });
    return rated.filter(([score]) => score).sort((a, b) => b[0] - a[0]).slice(0, 12).map(([, entry]) => entry);
  }
  window.siteSearch = find;

  document.addEventListener("DOMContentLoaded", () => {
    const at = (id) => document.getElementById(id), input = at("site-search"), results = at("site-results");
    at("site-theme").addEventListener("click", () => {
      try { localStorage.setItem("theme", root.dataset.theme === "dark" ? "light" : "dark"); } catch {}
      root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    });
    at("site-menu").addEventListener("click", () => at("site-menu").setAttribute("aria-expanded", at("site-pages").classList.toggle("open")));
    const here = document.querySelector("#site-pages [aria-current]");
    if (here) at("site-pages").scrollTop = here.offsetTop - at("site-pages").clientHeight / 2;
    function show() {
      results.replaceChildren(...find(input.value).map((entry) => {
        const item = document.createElement("li"), link = document.createElement("a"), small = document.createElement("small");
        link.href = up + entry.url;
        link.textContent = entry.head;
        small.textContent = entry.page;
        link.append(small);
        item.append(link);
        return item;
      }));
      results.hidden = !results.children.length;
    }
    input.addEventListener("focus", () => {
      if (window.SEARCH || document.getElementById("search-data")) return;
      const script = document.createElement("script");
      script.id = "search-data";
      script.src = up + "search-index.js";
      script.onload = show;
      document.head.append(script);
    });
    input.addEventListener("input", show);
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") results.hidden = true; });
  });
})();
