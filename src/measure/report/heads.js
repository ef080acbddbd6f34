const state = { layer: data.heads[0].layer, head: data.heads[0].head };
const layers = [...new Set(data.heads.map((h) => h.layer))];
const inLayer = (layer) => data.heads.filter((h) => h.layer === layer);
const percent = (x) => `${(100 * x).toFixed(1)} %`;

// Maps.

const DIVERGING = [[213, 94, 0], [242, 242, 242], [0, 114, 178]];
const width = (h, what) => h[what].singular_values.length;
const MAPS = [
  { name: "Effective rank of QK", of: (h) => h.qk.effective_rank, most: (h) => width(h, "qk"), show: fixed(1) },
  { name: "Effective rank of OV", of: (h) => h.ov.effective_rank, most: (h) => width(h, "ov"), show: fixed(1) },
  { name: "Copying score of OV", of: (h) => h.copying, ends: [-1, 1], colours: DIVERGING, show: fixed(2) },
  { name: "Energy of QK in a quarter of the width", of: (h) => h.qk.energy[1], show: fixed(2) },
  { name: "Condition of W_K", of: (h) => h.key_condition, log: true, show: short },
  { name: "Condition of W_V", of: (h) => h.value_condition, log: true, show: short },
];

function map({ name, of, most, ends, colours = VIRIDIS, log, show }) {
  const values = data.heads.map(of).filter((x) => typeof x === "number" && (!log || x > 0));
  const [low, high] = ends || (most ? [1, Math.max(...data.heads.map(most))] : [Math.min(...values), Math.max(...values)]);
  const scale = (x) => (log ? Math.log(x) : x);
  const colour = (x) => (typeof x === "number" ? ramp(colours, (scale(x) - scale(low)) / (scale(high) - scale(low) || 1)) : [128, 128, 128]);
  const n = Math.max(...data.heads.map((h) => h.head)) + 1;
  const cell = (h) => {
    if (!h) return make("td", {});
    const [value, picked] = [of(h), h.layer === state.layer && h.head === state.head];
    const back = colour(value);
    const pick = () => { state.layer = h.layer; state.head = h.head; update(); };
    return make("td", {
      style: `background:${css(back)};color:${inkOn(back)}`, class: picked ? "picked" : undefined, tabindex: "0", role: "button",
      title: `layer ${h.layer}, head ${h.head}: ${short(value) || "none"}`, onclick: pick,
      onkeydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); pick(); } },
    }, typeof value === "number" ? show(value) : "");
  };
  const row = (layer) => {
    const heads = inLayer(layer);
    return make("tr", {}, make("th", { scope: "row" }, String(layer)), ...Array.from({ length: n }, (_, i) => cell(heads.find((h) => h.head === i))));
  };
  const top = make("tr", {}, make("th", {}, ""), ...Array.from({ length: n }, (_, i) => make("th", { scope: "col" }, n > 12 && i % 4 ? "" : String(i))));
  const dense = n > 12 || layers.length > 12;
  const stops = Array.from({ length: 9 }, (_, i) => css(ramp(colours, i / 8))).join(",");
  return make("div", {}, make("h3", {}, name),
    make("table", { class: dense ? "heat dense" : "heat" }, make("thead", {}, top), make("tbody", {}, ...layers.map(row))),
    make("div", { class: "legend" }, make("span", {}, short(low)), make("i", { style: `background:linear-gradient(90deg,${stops})` }),
      make("span", {}, short(high)), make("span", {}, log ? "logarithmic" : "")));
}

// Charts.

function drawn(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const SIZE = { width: 460, height: 270, left: 52, right: 24, top: 10, bottom: 44 };
// Smaller singular values are drawn as this.
const FLOOR = 1e-4;

/** Lines that say where numbers are, and what the axes are. */
function frame(label, ys, yText, xs, xText, place) {
  const { width, height, left, right, top, bottom } = SIZE;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const text = (x, y, anchor, content, more = {}) =>
    svg.append(drawn("text", { x, y, "text-anchor": anchor, "font-size": 13, class: "ink", ...more }, content));
  for (const [y, name] of ys) {
    svg.append(drawn("line", { x1: left, x2: width - right, y1: place.y(y), y2: place.y(y), class: "grid" }));
    text(left - 6, place.y(y) + 4, "end", name);
  }
  for (const [x, name] of xs) text(place.x(x), height - bottom + 18, "middle", name);
  text((left + width - right) / 2, height - 6, "middle", xText);
  text(13, (top + height - bottom) / 2, "middle", yText, { transform: `rotate(-90 13 ${(top + height - bottom) / 2})` });
  return svg;
}

function spectrum(what) {
  const { width, height, left, right, top, bottom } = SIZE;
  const heads = inLayer(state.layer);
  const n = Math.max(...heads.map((h) => h[what].singular_values.length));
  const shares = (h) => h[what].singular_values.map((s) => Math.max(s / (h[what].singular_values[0] || 1), FLOOR));
  const least = Math.min(...heads.flatMap(shares));
  const decades = Math.max(1, Math.ceil(-Math.log10(least) - 1e-9));
  const place = {
    x: (i) => left + ((width - left - right) * i) / Math.max(n - 1, 1),
    y: (share) => top + ((height - top - bottom) * -Math.log10(share)) / decades,
  };
  const ys = Array.from({ length: decades + 1 }, (_, i) => [10 ** -i, i === 0 ? "1" : i < 3 ? String(Number((10 ** -i).toFixed(2))) : `1e-${i}`]);
  const xs = [...new Set([0, 0.25, 0.5, 0.75, 1].map((share) => Math.max(Math.round(share * n) - 1, 0)))].map((i) => [i, String(i + 1)]);
  const name = what.toUpperCase();
  const svg = frame(`Singular values of ${name}`, ys, `${name}, relative`, xs, "singular value", place);
  const chosen = heads.find((h) => h.head === state.head);
  for (const h of [...heads.filter((x) => x !== chosen), chosen]) {
    const points = shares(h).map((s, i) => `${place.x(i).toFixed(1)},${place.y(s).toFixed(1)}`).join(" ");
    svg.append(drawn("polyline", { points, class: h === chosen ? "line picked" : "line" }, drawn("title", {}, `head ${h.head}`)));
  }
  return make("figure", {}, svg);
}

function planes(head) {
  byId("planes").hidden = head.planes.length === 0;
  if (!head.planes.length) return;
  const { width, height, left, right, top, bottom } = SIZE;
  const n = head.planes.length;
  const most = Math.max(...head.planes.map((p) => p.energy));
  const step = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((s) => most / s <= 5) || 0.5;
  const high = Math.ceil(most / step) * step;
  const place = {
    x: (i) => left + ((width - left - right) * (i + 0.5)) / n,
    y: (share) => height - bottom - ((height - top - bottom) * share) / high,
  };
  const ys = Array.from({ length: Math.round(high / step) + 1 }, (_, i) => [i * step, String(Number((100 * i * step).toFixed(1)))]);
  const xs = [...new Set([0, 0.25, 0.5, 0.75, 1].map((share) => Math.round(share * (n - 1))))].map((i) => [i, short(Number(head.planes[i].wavelength.toPrecision(2)))]);
  const svg = frame("Energy by rotary plane", ys, "% of energy", xs, "positions of a turn", place);
  head.planes.forEach((plane, i) => {
    const wide = (0.8 * (width - left - right)) / n;
    svg.append(drawn("rect", { x: place.x(i) - wide / 2, y: place.y(plane.energy), width: wide, height: place.y(0) - place.y(plane.energy), class: "bar" },
      drawn("title", {}, `plane ${i}, ${short(plane.wavelength)} positions: ${percent(plane.energy)}`)));
  });
  byId("bars").replaceChildren(make("figure", {}, svg));
}

// Numbers and tokens.

function numbers(head) {
  const list = (all) => all.map((x) => String(Number((100 * x).toFixed(1)))).join(", ");
  const product = (p) => `norm ${short(p.norm)}, effective rank ${p.effective_rank.toFixed(1)} of ${p.singular_values.length}; ` +
    `${list(p.energy_at)} % of the width keep ${list(p.energy)} % of the squares`;
  const whole = head.layer_key_condition === null ? "W_K of the layer has more rows than columns" : `W_K of the layer ${short(head.layer_key_condition)}`;
  const rows = [["QK", product(head.qk)], ["OV", `${product(head.ov)}; copying score ${head.copying.toFixed(2)}`],
    ["Condition", `W_K ${short(head.key_condition)}, W_V ${short(head.value_condition)}; ${whole}`]];
  byId("numbers").replaceChildren(...rows.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
}

function pieces(found) {
  const piece = (m) => make("span", { class: "piece", title: `${short(m.score)}, token ${m.id}` }, m.token.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅");
  return found.map(piece);
}

function tokens(head) {
  const rows = [["qk", "QK", "query", "key"], ["ov", "OV", "read", "write"]].flatMap(([what, name, left, right]) =>
    head[what].directions.flatMap((poles, d) => poles.map((pole, sign) => make("tr", { class: sign ? "opposite" : undefined },
      make("th", { scope: "row" }, sign ? "" : `${name} ${d}`), make("td", { class: "number" }, sign ? "" : short(head[what].singular_values[d])),
      make("td", {}, sign ? "−" : "+"), make("td", {}, ...pieces(pole[left])), make("td", {}, "→"), make("td", {}, ...pieces(pole[right]))))));
  byId("directions").hidden = rows.length === 0;
  const names = ["", "singular value", "", "queries, or what is read", "", "keys looked for, or what is written"];
  const top = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
  byId("tokens").replaceChildren(make("thead", {}, top), make("tbody", {}, ...rows));
}

function update() {
  const heads = inLayer(state.layer);
  const head = heads.find((h) => h.head === state.head) || heads[0];
  state.head = head.head;
  options("layer", layers.map((i) => [i, i]), state.layer);
  options("head", heads.map((h) => [h.head, h.head]), state.head);
  byId("maps").replaceChildren(...MAPS.map(map));
  numbers(head);
  byId("spectra").replaceChildren(spectrum("qk"), spectrum("ov"));
  planes(head);
  tokens(head);
}

for (const id of ["layer", "head"]) {
  byId(id).addEventListener("change", (e) => {
    state[id] = Number(e.target.value);
    update();
  });
}
update();
