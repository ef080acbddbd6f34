"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An element with attributes and children; text children are text, never markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** A few digits that count. */
function short(x) {
  if (x === null || x === undefined) return "";
  if (x === 0) return "0";
  const size = Math.abs(x);
  return size < 1e-3 || size >= 1e5 ? x.toExponential(1) : String(Number(x.toPrecision(3)));
}
const fixed = (digits, factor = 1) => (x) => (typeof x === "number" ? (factor * x).toFixed(digits) : "");

// Viridis (Smith and van der Walt 2015), nine of its colours.
const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129],
  [92, 200, 99], [170, 220, 50], [253, 231, 37]];

function ramp(colours, x) {
  const at = Math.min(Math.max(x, 0), 1) * (colours.length - 1);
  const i = Math.min(Math.floor(at), colours.length - 2);
  return colours[i].map((c, k) => Math.round(c + (at - i) * (colours[i + 1][k] - c)));
}
const css = (rgb) => `rgb(${rgb.join(",")})`;
const inkOn = (rgb) => (0.3 * rgb[0] + 0.6 * rgb[1] + 0.1 * rgb[2] > 125 ? "#000" : "#fff");

/** Fills a select with pairs of a value and its name. */
function options(id, values, chosen) {
  byId(id).replaceChildren(...values.map(([value, name]) => make("option", { value, selected: String(value) === String(chosen) ? "" : undefined }, name)));
}
