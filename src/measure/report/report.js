const variants = data.variants;
const planned = variants.filter((v) => v.role !== "yardstick");
const baseline = variants.find((v) => v.role === "baseline");

// For negative weights.
const NEGATIVE = [[68, 1, 84], [213, 94, 0]];

const differs = (v) => v.role === "variant" && v.kl_mean > 1e-3;
const state = {
  variant: (planned.find(differs) || planned.find((v) => v.role === "variant") || baseline).name,
  statistic: "output_err", layer: 0, head: 0, query: null,
};

// The table.

const has = (name) => variants.some((v) => typeof v[name] === "number");
const pair = (name, err, show) => (v) => {
  const known = typeof v[err] === "number" && v[name] !== 0;
  return [show(v[name]), make("span", { class: "err" }, known ? ` ± ${show(v[err])}` : "")];
};
function ratio(what, ranged) {
  return (v) => {
    const x = v[`${what}_ratio`];
    if (typeof x !== "number") return [""];
    const [low, high] = [v[`${what}_ratio_min`], v[`${what}_ratio_max`]];
    const range = `${low.toFixed(2)}–${high.toFixed(2)}`;
    const number = make("span", { class: low <= 1 && high >= 1 ? "noise" : "", title: range }, x.toFixed(2));
    return ranged ? [number, make("span", { class: "err" }, ` (${range})`)] : [number];
  };
}
const columns = [
  { key: "pareto_rank", name: "rank", title: "Pareto rank by KL and decoding speed" },
  { key: "name", name: "variant" },
  { key: "mask", name: "mask", only: () => new Set(planned.map((v) => v.mask)).size > 1 },
  { key: "ppl", name: "perplexity", cell: pair("ppl", "ppl_err", (x) => (x < 1000 ? fixed(1)(x) : short(x))) },
  { key: "kl_mean", name: "KL, nats", cell: pair("kl_mean", "kl_err", short) },
  { key: "yardstick_ratio", name: "like", title: "KL as a multiple of a yardstick's",
    cell: (v) => [v.yardstick ? `${v.yardstick_ratio < 0.01 ? "<0.01" : short(Number(v.yardstick_ratio.toPrecision(2)))}× ${v.yardstick}` : ""] },
  { key: "same_top", name: "same top, %", cell: (v) => [fixed(1, 100)(v.same_top)] },
  { key: "retrieval_p_gain", name: "recall, %", title: "What hiding a passage in a text adds to the probability of its tokens when it comes again",
    cell: (v) => [fixed(1, 100)(v.retrieval_p_gain)] },
  { key: "prefill_ratio", name: "prefill", title: "Speed over the baseline's; grey where the range over rounds holds 1", cell: ratio("prefill", false) },
  { key: "decode_ratio", name: "decode", title: "Speed over the baseline's, with the range over rounds; grey where it holds 1", cell: ratio("decode", true) },
  { key: "cache_bytes_per_token", name: "cache, B/token", cell: (v) => [fixed(0)(v.cache_bytes_per_token)],
    only: () => new Set(planned.map((v) => v.cache_bytes_per_token)).size > 1 },
].filter((c) => (c.only ? c.only() : c.key === "name" || has(c.key)));
let order = { key: null, down: false };

function table() {
  const rows = [...variants];
  const value = (v) => (v[order.key] === null || v[order.key] === undefined ? null : v[order.key]);
  if (order.key) {
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? -1 : x > y ? 1 : 0) * (order.down ? -1 : 1);
    });
  }
  const heads = columns.map((c) => make("th", {
    scope: "col", class: c.key === "name" ? "name" : undefined, title: c.title,
    "aria-sort": order.key === c.key ? (order.down ? "descending" : "ascending") : undefined,
  }, make("button", { type: "button", onclick: () => {
    order = { key: c.key, down: order.key === c.key && !order.down };
    table();
    byId("variants").querySelector(`th:nth-child(${columns.indexOf(c) + 1}) button`).focus();
  } }, c.name)));
  const body = rows.map((v) => make("tr", { class: `${v.role}${v.name === state.variant ? " picked" : ""}`, "data-name": v.name },
    ...columns.map((c) => {
      if (c.key !== "name") return make("td", {}, ...(c.cell ? c.cell(v) : [String(v[c.key] ?? "")]));
      const pick = v.role === "yardstick" ? v.name : make("button", { type: "button", onclick: () => choose(v.name) }, v.name);
      return make("td", { class: "name", title: v.name }, pick);
    })));
  byId("variants").replaceChildren(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
}

// Points of the scatter come in the order of the variants that have a divergence and are no yardsticks.

function scatter() {
  const plotted = planned.filter((v) => typeof v.kl_mean === "number");
  for (const box of byId("scatter").querySelectorAll("svg")) {
    [...box.querySelectorAll("circle")].forEach((circle, i) => {
      const v = plotted[i];
      if (!v) return;
      circle.setAttribute("tabindex", "0");
      circle.setAttribute("role", "button");
      circle.setAttribute("aria-label", v.name);
      circle.dataset.name = v.name;
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = `${v.name}\nKL ${short(v.kl_mean)}, decode ${fixed(2)(v.decode_ratio)}, perplexity ${fixed(2)(v.ppl)}`;
      circle.append(title);
      circle.addEventListener("click", () => choose(v.name));
      circle.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(v.name); } });
    });
  }
}

// Heads.

const STATISTICS = {
  output_err: ["output error", "Distance of a head's outputs to those of the normalizer it was trained with, on the same scores and values, relative to their length."],
  entropy: ["entropy", "Entropy of a row of weights, divided by their sum, in nats; mean over rows."],
  sink: ["sink mass", "Weight of the first token; mean over rows."],
  mass: ["row mass", "Sum of a row of weights; mean over rows. Softmax: 1."],
  support: ["support", "Share of the visible keys that have a weight; mean over rows."],
};

function heads() {
  const v = variants.find((x) => x.name === state.variant);
  const pairs = v === baseline ? [baseline] : [baseline, v];
  const values = pairs.flatMap((x) => x.heads.map((h) => h[state.statistic])).filter((x) => typeof x === "number");
  const [low, high] = [Math.min(0, ...values), Math.max(...values, 1e-4)];
  const grid = (x) => {
    const layers = [...new Set(x.heads.map((h) => h.layer))];
    const n = Math.max(...x.heads.map((h) => h.head)) + 1;
    const row = (layer) => make("tr", {}, make("th", { scope: "row" }, String(layer)),
      ...x.heads.filter((h) => h.layer === layer).map((h) => {
        const value = h[state.statistic];
        const colour = typeof value === "number" ? ramp(VIRIDIS, (value - low) / (high - low)) : [128, 128, 128];
        const picked = h.layer === state.layer && h.head === state.head;
        const pick = () => { state.layer = h.layer; state.head = h.head; update(); };
        return make("td", {
          style: `background:${css(colour)};color:${inkOn(colour)}`, class: picked ? "picked" : undefined, tabindex: "0",
          title: `layer ${h.layer}, head ${h.head}: ${short(value)} (${h.norm})`, onclick: pick,
          onkeydown: (e) => { if (e.key === "Enter") pick(); },
        }, short(value));
      }));
    const head = make("tr", {}, make("th", {}, ""), ...Array.from({ length: n }, (_, i) => make("th", { scope: "col" }, String(i))));
    return make("div", {}, make("h3", {}, x.name),
      make("table", { class: n > 12 ? "heat dense" : "heat" }, make("thead", {}, head), make("tbody", {}, ...layers.map(row))));
  };
  const stops = VIRIDIS.map((c) => css(c)).join(",");
  const legend = make("div", { class: "legend" }, make("span", {}, short(low)),
    make("i", { style: `background:linear-gradient(90deg,${stops})` }), make("span", {}, short(high)),
    make("span", {}, "Layers downwards, heads across."));
  byId("heads").replaceChildren(...pairs.map(grid), legend);
  byId("statistic-note").textContent = STATISTICS[state.statistic][1];
  byId("histograms").innerHTML = data.histograms[state.variant] || "";
}

// Patterns.

const bytesOf = {};
function weightsOf(name) {
  const plan = data.patterns && data.patterns.plans.find((p) => p.name === name);
  if (!plan) return null;
  const n = data.patterns.tokens.length;
  const bytes = (bytesOf[name] ||= Int8Array.from(atob(plan.weights), (c) => c.charCodeAt(0)));
  const size = plan.square ? n * n : (n * (n + 1)) / 2;
  const before = plan.scales.slice(0, state.layer).reduce((sum, layer) => sum + layer.length, 0) + state.head;
  const scale = plan.scales[state.layer][state.head];
  return {
    scale,
    at: (q, k) => {
      if (!plan.square && k > q) return null;
      return (scale * bytes[before * size + (plan.square ? q * n : (q * (q + 1)) / 2) + k]) / 127;
    },
  };
}

/** The colour of a weight: by the root of its share of the largest, so that small ones show. */
function shade(weight, scale) {
  const x = Math.sqrt(Math.abs(weight) / (scale || 1));
  return weight < 0 ? ramp(NEGATIVE, x) : ramp(VIRIDIS, x);
}

function show(text) {
  return text.replace(/\n/g, "⏎\n") || "∅";
}

function maps() {
  if (!data.patterns) return byId("patterns").remove();
  const { tokens } = data.patterns;
  const n = tokens.length;
  state.query ??= n - 1;
  const shown = state.variant === baseline.name ? [baseline.name] : [baseline.name, state.variant];
  const views = shown.map((name) => {
    const weights = weightsOf(name);
    const box = make("div", {}, make("h3", {}, name));
    if (!weights) {
      box.append(make("p", { class: "note" }, "No pattern is kept for this variant."));
      return { box, paint: () => {} };
    }
    const canvas = make("canvas", { width: n, height: n, role: "img", "aria-label": `Attention weights of ${name}, layer ${state.layer}, head ${state.head}` });
    const context = canvas.getContext("2d");
    const image = context.createImageData(n, n);
    for (let q = 0; q < n; q++) {
      for (let k = 0; k < n; k++) {
        const w = weights.at(q, k);
        if (w !== null) image.data.set([...shade(w, weights.scale), 255], 4 * (q * n + k));
      }
    }
    const mark = make("i", { class: "mark", style: `height:${100 / n}%` });
    const readout = make("p", { class: "readout" });
    const text = make("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": `Text with weights of ${name}` });
    const spans = tokens.map((token, i) => make("span", { onmouseenter: () => look(i), onclick: () => look(i) }, show(token)));
    text.append(...spans);
    text.addEventListener("keydown", (e) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[e.key];
      if (step) { e.preventDefault(); look(Math.min(Math.max(state.query + step, 0), n - 1)); }
    });
    canvas.addEventListener("mousemove", (e) => {
      const cell = (x, size) => Math.min(n - 1, Math.max(0, Math.floor((n * x) / size)));
      const [q, k] = [cell(e.offsetY, canvas.clientHeight), cell(e.offsetX, canvas.clientWidth)];
      look(q);
      const w = weights.at(q, k);
      readout.textContent = `“${tokens[q]}” → “${tokens[k]}”: ${w === null ? "hidden" : short(w)}`;
    });
    box.append(make("div", { class: "map" }, canvas, mark), readout, text);
    const paint = () => {
      context.putImageData(image, 0, 0);
      mark.style.top = `${(100 * state.query) / n}%`;
      let best = 0;
      spans.forEach((span, k) => {
        const w = weights.at(state.query, k);
        span.className = k === state.query ? "query" : w === null ? "later" : "";
        if (w !== null && w > weights.at(state.query, best)) best = k;
        // Below a hundredth of the largest, a text would only become harder to read.
        const colour = w === null || Math.abs(w) < weights.scale / 100 ? null : shade(w, weights.scale);
        span.style.background = colour ? css(colour) : "";
        span.style.color = colour ? inkOn(colour) : "";
        span.title = w === null ? "hidden" : short(w);
      });
      readout.textContent = `“${tokens[state.query]}” attends most to “${tokens[best]}” (${short(weights.at(state.query, best))})`;
    };
    return { box, paint };
  });
  function look(q) {
    state.query = q;
    views.forEach((view) => view.paint());
  }
  byId("maps").replaceChildren(...views.map((view) => view.box));
  look(state.query);
}

// Controls.

function update() {
  const layers = [...new Set(baseline.heads.map((h) => h.layer))];
  const inLayer = baseline.heads.filter((h) => h.layer === state.layer).map((h) => h.head);
  if (!inLayer.includes(state.head)) state.head = 0;
  options("variant", planned.map((v) => [v.name, v.name]), state.variant);
  options("statistic", Object.entries(STATISTICS).map(([key, [name]]) => [key, name]), state.statistic);
  options("layer", layers.map((i) => [i, i]), state.layer);
  options("head", inLayer.map((i) => [i, i]), state.head);
  for (const element of document.querySelectorAll("#scatter circle, #variants tbody tr")) {
    element.classList.toggle("picked", element.dataset.name === state.variant);
  }
  heads();
  maps();
}

function choose(name) {
  state.variant = name;
  update();
}

for (const [id, number] of [["variant", false], ["statistic", false], ["layer", true], ["head", true]]) {
  byId(id).addEventListener("change", (e) => {
    state[id] = number ? Number(e.target.value) : e.target.value;
    update();
  });
}
table();
scatter();
if (baseline) update();
