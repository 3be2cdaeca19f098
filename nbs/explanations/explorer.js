// The rules of masking.branch_heads, masking.attention_counts, plotting.reached and decoding.kv_cache_bytes, again.
// `patternExplorer` holds the functions, so that they can be compared with those of Python.
(function () {
  "use strict";

  function headGroups(heads, branches) {
    const size = Math.floor(heads / branches), extra = heads % branches, found = [];
    let first = 0;
    for (let g = 0; g < branches; g++) {
      const last = first + size + (g < extra ? 1 : 0);
      found.push([first, last]);
      first = last;
    }
    return found;
  }

  // [[head, ...], offset] pairs of branch g
  function branchHeads(o, g) {
    const r = o.rates[g], range = (a, b, step) => { const x = []; for (let i = a; i < b; i += step) x.push(i); return x; };
    if (o.mixing === "groups") {
      const [a, b] = headGroups(o.heads, o.rates.length)[g];
      return [[range(a, b, 1), g % r]];
    }
    if (o.offsets === "interleaved") return range(0, Math.min(r, o.heads), 1).map((s) => [range(s, o.heads, r), s]);
    const size = Math.ceil(o.heads / r);
    return range(0, o.heads, size).map((a) => [range(a, Math.min(a + size, o.heads), 1), a / size]);
  }

  // [branch, offset] pairs of one head
  function branchesOf(o, head) {
    const found = [];
    o.rates.forEach((_, g) => branchHeads(o, g).forEach(([heads, s]) => { if (heads.includes(head)) found.push([g, s]); }));
    return found;
  }

  // tokens of the grid below x, counted from the start of the sequence
  function gridBelow(x, w, r, s) {
    const inside = (y) => (y > s ? Math.ceil((y - s) / r) : 0);
    return Math.floor(x / w) * inside(w) + inside(x % w);
  }

  const triangle = (c) => (c * (c + 1)) / 2;

  // pairs that the branch sees among queries [a, b) and keys [c, d): equal ranges, or ranges that do not meet
  function pairsBetween(a, b, c, d, w, r, s, causal) {
    if (a === c) {
      const of = (x, y) => { const m = gridBelow(y, w, r, s) - gridBelow(x, w, r, s); return causal ? triangle(m) : m * m; };
      const first = Math.ceil(a / w), last = Math.floor(b / w);
      if (first > last) return of(a, b);
      return of(a, first * w) + (last - first) * of(0, w) + of(last * w, b);
    }
    if (causal && c > a) return 0;
    const segment = Math.floor((c > a ? b - 1 : d - 1) / w), lo = segment * w, hi = lo + w; // the only one that can meet both
    const count = (x, y) => Math.max(0, gridBelow(Math.min(y, hi), w, r, s) - gridBelow(Math.max(x, lo), w, r, s));
    return Math.min(b, hi) > Math.max(a, lo) && Math.min(d, hi) > Math.max(c, lo) ? count(a, b) * count(c, d) : 0;
  }

  // counts[branch][row][column] of one head, in cells of `step` tokens
  function cells(o, head, step) {
    const rows = Math.ceil(o.n / step), edge = (i) => Math.min(i * step, o.n);
    return branchesOf(o, head).map(([g, s]) => ({
      branch: g,
      counts: Array.from({ length: rows }, (_, i) => Array.from({ length: rows }, (_, j) =>
        pairsBetween(edge(i), edge(i + 1), edge(j), edge(j + 1), o.lengths[g], o.rates[g], s, o.causal))),
    }));
  }

  function pairs(o) {
    let sum = 0;
    o.rates.forEach((r, g) => branchHeads(o, g).forEach(([heads, s]) => {
      sum += heads.length * pairsBetween(0, o.n, 0, o.n, o.lengths[g], r, s, o.causal);
    }));
    return sum;
  }

  const flops = (o) => 4 * o.headDim * pairs(o) * o.layers * o.batch;
  const denseFlops = (o) => 4 * o.headDim * o.heads * (o.causal ? triangle(o.n) : o.n * o.n) * o.layers * o.batch;

  // which inputs `token` depends on after 0 ... layers layers
  function reached(o, token, layers) {
    const grids = new Map();
    o.rates.forEach((r, g) => branchHeads(o, g).forEach(([, s]) => grids.set(g + ":" + s, [o.lengths[g], r, s])));
    let known = new Uint8Array(o.n);
    known[token] = 1;
    const rows = [known];
    for (let layer = 0; layer < layers; layer++) {
      const next = Uint8Array.from(known);
      for (const [w, r, s] of grids.values())
        for (let i = 0; i < o.n; i++)
          if (known[i] && (i % w) % r === s) {
            const start = Math.floor(i / w) * w, end = o.causal ? i + 1 : Math.min(start + w, o.n);
            for (let j = start + s; j < end; j += r) next[j] = 1;
          }
      rows.push((known = next));
    }
    return rows.map((row) => Array.from(row));
  }

  // kv_cache_bytes(config, batch, max_seq_len=n)
  function cacheBytes(o) {
    const repeat = o.heads / o.kvHeads;
    let slots = 0;
    o.rates.forEach((r, g) => branchHeads(o, g).forEach(([heads]) => {
      slots += new Set(heads.map((h) => Math.floor(h / repeat))).size * Math.ceil(Math.min(o.lengths[g], o.n) / r);
    }));
    return 2 * slots * o.headDim * o.bytes * o.layers * o.batch;
  }

  const fullCacheBytes = (o) => 2 * o.kvHeads * o.n * o.headDim * o.bytes * o.layers * o.batch;

  // whether no token can ever see beyond its segment of the longest branch: all others lie within such segments
  const confined = (o) => o.lengths.every((w) => Math.max(...o.lengths) % w === 0);

  // a number with three digits (four from 1,000 to 1,023) and a unit
  function scaled(x, units, base) {
    let i = 0;
    const shown = () => (i && x < 999.5 ? x.toPrecision(3) : String(Math.round(x)));
    while (+shown() >= base && i < units.length - 1) { x = Math.max(1, x / base); i++; }
    return `${shown()} ${units[i]}`;
  }
  const flop = (x) => scaled(x, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"], 1000);
  const size = (x) => scaled(x, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 1024);

  function complaint(o) {
    const whole = (name, x, low, high) => (Number.isInteger(x) && x >= low && x <= high ? "" : `${name} must be a whole number from ${low} to ${high}, got ${x}`);
    if (o.lengths.length !== o.rates.length) return `every branch needs one segment length and one rate, got ${o.lengths.length} and ${o.rates.length}`;
    if (o.lengths.length > 8) return `at most 8 branches here, got ${o.lengths.length}`;
    const found = [...o.lengths.map((w) => whole("a segment length", w, 1, 2 ** 30)), ...o.rates.map((r) => whole("a dilation rate", r, 1, 2 ** 30)),
      whole("heads", o.heads, 1, 256), whole("key/value heads", o.kvHeads, 1, 256), whole("tokens", o.n, 1, 2 ** 30), whole("head_dim", o.headDim, 1, 1024),
      whole("layers", o.layers, 1, 1000), whole("batch", o.batch, 1, 100000)].find(Boolean);
    if (found) return found;
    if (o.heads % o.kvHeads) return `key/value heads must divide the heads, got ${o.kvHeads} for ${o.heads}`;
    if (o.mixing === "groups" && o.heads < o.lengths.length) return `groups mixing needs a head for each branch, got ${o.heads} for ${o.lengths.length} branches`;
    return "";
  }

  window.patternExplorer = { branchHeads, cells, pairs, flops, denseFlops, reached, cacheBytes, fullCacheBytes, confined, flop, size, complaint };

  // ---- the page ----
  const PRESETS = {
    "small: 8, 16, 32": { lengths: "8, 16, 32", rates: "1, 2, 4", heads: 4, kvHeads: 4, n: 32, mixing: "softmax", headDim: 64, layers: 4 },
    "the six lines of the README": { lengths: "1024, 4096", rates: "1, 4", heads: 8, kvHeads: 8, n: 4096, mixing: "groups", headDim: 64, layers: 1 },
    "LongNet, 125M": { lengths: "2048, 4096, 8192, 16384, 32768", rates: "1, 2, 4, 6, 12", heads: 12, kvHeads: 12, n: 32768, mixing: "softmax", headDim: 64, layers: 12 },
    "a million tokens": { lengths: "2048, 4096, 8192, 16384", rates: "1, 2, 4, 8", heads: 8, kvHeads: 8, n: 1048576, mixing: "softmax", headDim: 64, layers: 1 },
  };
  const FIELDS = [
    ["preset", "preset", "select", Object.keys(PRESETS), "wide"], ["lengths", "segment lengths", "text", "", "wide"], ["rates", "dilation rates", "text", "", "wide"],
    ["n", "tokens", "number"], ["heads", "heads", "number"], ["kvHeads", "key/value heads", "number"], ["mixing", "mixing", "select", ["groups", "softmax"]],
    ["offsets", "offsets", "select", ["blocked", "interleaved"]], ["headDim", "head_dim", "number"], ["layers", "layers", "number"], ["batch", "batch", "number"],
    ["bytes", "numbers", "select", ["bfloat16", "float32"]], ["head", "head to draw", "number"], ["token", "token to follow", "number"], ["causal", "causal", "checkbox"],
  ];
  const root = document.getElementById("explorer");
  if (!root) return;
  const form = document.createElement("form"), show = document.createElement("div"), input = {};
  form.setAttribute("aria-label", "pattern");
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const [name, text, kind, values, style] of FIELDS) {
    const label = document.createElement("label"), field = document.createElement(kind === "select" ? "select" : "input");
    if (kind === "select") values.forEach((v) => field.add(new Option(v)));
    else field.type = kind;
    if (kind === "number") field.min = name === "head" || name === "token" ? 0 : 1;
    field.id = "explorer-" + name;
    label.className = kind === "checkbox" ? "check" : style || "";
    label.append(...(kind === "checkbox" ? [field, text] : [text, field]));
    form.append(label);
    input[name] = field;
  }
  root.replaceChildren(form, show);

  const list = (text) => text.split(/[\s,;]+/).filter(Boolean).map(Number);
  function options() {
    const number = (name) => (input[name].value.trim() === "" ? NaN : Number(input[name].value));
    return { lengths: list(input.lengths.value), rates: list(input.rates.value), heads: number("heads"), kvHeads: number("kvHeads"), n: number("n"), mixing: input.mixing.value,
      offsets: input.offsets.value, causal: input.causal.checked, headDim: number("headDim"), layers: number("layers"), batch: number("batch"), bytes: input.bytes.value === "float32" ? 4 : 2 };
  }
  const colour = (g) => `var(--e${g + 1})`;
  const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

  function maskPicture(o, head) {
    const step = Math.ceil(o.n / 64), layers = cells(o, head, step).sort((a, b) => o.rates[a.branch] - o.rates[b.branch]);
    const rows = Math.ceil(o.n / step), parts = [];
    for (let i = 0; i < rows; i++)
      for (let j = 0; j < rows; j++) {
        const top = layers.find((l) => l.counts[i][j]), share = top ? top.counts[i][j] / step ** 2 : 0;
        if (top) parts.push(`<rect x="${j + 0.06}" y="${i + 0.06}" width=".88" height=".88" fill="${colour(top.branch)}" opacity="${Math.max(0.15, Math.sqrt(Math.min(1, share))).toFixed(2)}"/>`);
      }
    const what = `Mask of head ${head}: ${o.n} tokens${step > 1 ? `, ${step} to a cell` : ""}`;
    return `<h2>${what}</h2><svg id="explorer-mask" viewBox="0 0 ${rows} ${rows}" role="img" aria-label="${what}; rows are queries, columns keys"><rect class="paper" width="${rows}" height="${rows}"/>${parts.join("")}</svg>`;
  }

  function reachPicture(o, token) {
    const longest = Math.max(...o.lengths).toLocaleString("en"), crossing = "Not every segment length divides the longest, so segments lie across borders of others, and what a token knows can pass on from one to the next, layer after layer.";
    const limit = confined(o) ? `Every segment length divides the longest, so no token ever learns of what lies outside its own segment of ${longest} tokens, however many layers there are.` : crossing;
    if (o.n > 1024) return `<h2>Receptive field</h2><p id="explorer-limit">Drawn for up to 1,024 tokens. ${limit}</p>`;
    const rows = reached(o, token, Math.min(o.layers, 12)), parts = [], height = Math.max(1, o.n / 24);
    rows.forEach((row, i) => row.forEach((seen, j) => { if (seen) parts.push(`<rect x="${j}" y="${i * height}" width="1" height="${height * 0.86}" fill="${i ? colour((i - 1) % 7) : "currentColor"}"/>`); }));
    const counts = rows.map((row) => row.reduce((a, b) => a + b, 0));
    const body = counts.map((c, i) => `<tr><td>${i}</td><td>${c}</td><td>${((100 * c) / o.n).toFixed(0)} %</td></tr>`).join("");
    return `<h2>Receptive field of token ${token}</h2><svg id="explorer-reach" viewBox="0 0 ${o.n} ${rows.length * height}" role="img" aria-label="Inputs that token ${token} depends on: after ${rows.length - 1} layers ${counts.at(-1)} of ${o.n}"><rect class="paper" width="${o.n}" height="${rows.length * height}"/>${parts.join("")}</svg><p id="explorer-limit">${limit}</p><table><tr><th>layers</th><th>tokens reached</th><th>share</th></tr>${body}</table>`;
  }

  function draw() {
    const o = options();
    let wrong = complaint(o);
    const head = Number(input.head.value), token = Number(input.token.value);
    if (!wrong && !(Number.isInteger(head) && head >= 0 && head < o.heads)) wrong = `head to draw must be one of 0 to ${o.heads - 1}, got ${input.head.value}`;
    if (!wrong && !(Number.isInteger(token) && token >= 0 && token < o.n)) wrong = `token to follow must be one of 0 to ${o.n - 1}, got ${input.token.value}`;
    input.offsets.disabled = o.mixing === "groups";
    if (wrong) {
      show.innerHTML = `<p class="complaint" role="alert">${escape(wrong)}</p>`;
      return;
    }
    const mine = new Set(branchesOf(o, head).map(([g]) => g));
    const legend = o.lengths.map((w, g) => `<span${mine.has(g) ? "" : ' class="other" title="not of this head"'}><i style="background:${colour(g)}"></i>w = ${w}, r = ${o.rates[g]}</span>`).join("");
    show.innerHTML = `<table id="explorer-numbers" aria-live="polite"><tr><th></th><th>dilated</th><th>dense</th><th>dilated / dense</th></tr>` +
      [["forward pass", flop, flops(o), denseFlops(o)], ["key/value cache", size, cacheBytes(o), fullCacheBytes(o)]].map(([what, unit, a, b]) =>
        `<tr><td>${what}</td><td>${unit(a)}</td><td>${unit(b)}</td><td>${(a / b).toPrecision(3)}</td></tr>`).join("") +
      `</table><div class="legend">${legend}</div><div class="pictures"><div>${maskPicture(o, head)}</div><div>${reachPicture(o, token)}</div></div>`;
  }

  function preset() {
    const p = PRESETS[input.preset.value];
    for (const [name, value] of Object.entries(p)) input[name].value = value;
    Object.assign(input.head, { value: 0 });
    Object.assign(input.token, { value: p.n - 1 });
    input.batch.value = 1;
    input.causal.checked = true;
    draw();
  }
  input.preset.addEventListener("change", preset);
  form.addEventListener("input", (event) => { if (event.target !== input.preset) draw(); });
  preset();
})();
