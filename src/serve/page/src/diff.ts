// Which pieces of two texts are in both, in order.

// A table of this many cells takes a few milliseconds.
const MOST = 4_000_000;

/** For each piece, whether it is missing on the other side of a longest common subsequence. */
export function differing(a: string[], b: string[]): [boolean[], boolean[]] {
  const [inA, inB] = [a.map(() => true), b.map(() => true)];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) {
    inA[start] = inB[start] = false;
    start++;
  }
  let [endA, endB] = [a.length, b.length];
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) {
    inA[--endA] = inB[--endB] = false;
  }
  const [rows, columns] = [endA - start, endB - start];
  if (rows * columns === 0 || rows * columns > MOST) return [inA, inB];
  const width = columns + 1;
  // longest[i * width + j]: of what follows the i-th and j-th piece.
  const longest = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i--) {
    for (let j = columns - 1; j >= 0; j--) {
      longest[i * width + j] =
        a[start + i] === b[start + j]
          ? longest[(i + 1) * width + j + 1]! + 1
          : Math.max(longest[(i + 1) * width + j]!, longest[i * width + j + 1]!);
    }
  }
  for (let [i, j] = [0, 0]; i < rows && j < columns; ) {
    if (a[start + i] === b[start + j]) inA[start + i++] = inB[start + j++] = false;
    else if (longest[(i + 1) * width + j]! >= longest[i * width + j + 1]!) i++;
    else j++;
  }
  return [inA, inB];
}
