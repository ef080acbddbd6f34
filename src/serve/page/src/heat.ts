// A matrix of signed weights as pixels.

export type Colour = [number, number, number];

/** Signed bytes [n, n], row = query, column = key. */
export function decode(base64: string): Int8Array {
  const text = atob(base64);
  return Int8Array.from(text, (c) => c.charCodeAt(0));
}

/** Colour grows as the root of the weight: what most heads give to most keys is a few percent. */
export function warmth(weight: number, max: number): number {
  return max > 0 ? Math.sqrt(Math.min(1, Math.abs(weight) / max)) : 0;
}

/** From paper, at 0, to one colour for positive weights and another for negative ones. */
export function paint(canvas: HTMLCanvasElement, weights: Int8Array, n: number, paper: Colour, more: Colour, less: Colour) {
  canvas.width = canvas.height = n;
  const context = canvas.getContext("2d");
  if (!context) return;
  const image = context.createImageData(n, n);
  for (let i = 0; i < n * n; i++) {
    const weight = weights[i]!;
    const t = warmth(weight, 127);
    const end = weight < 0 ? less : more;
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = paper[c]! + (end[c]! - paper[c]!) * t;
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

/** The colour that a custom property of the page names, as #rrggbb. */
export function colourOf(name: string): Colour {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => Number.parseInt(text.slice(at, at + 2), 16)) as Colour;
}
