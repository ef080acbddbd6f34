// Makes dist/index.html, the whole page in one file, and dist/csp.txt, the policy that allows just its script and style.
import { createHash } from "node:crypto";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { build } from "esbuild";

const LIMIT = 140_000;
const here = (path) => new URL(path, import.meta.url);

async function bundle(entry) {
  const { outputFiles } = await build({
    absWorkingDir: here(".").pathname,
    entryPoints: [entry],
    bundle: true,
    minify: true,
    write: false,
    format: "iife",
    target: ["es2022", "chrome111", "firefox113", "safari16.4"],
    jsx: "automatic",
    jsxImportSource: "preact",
    legalComments: "none",
    charset: "utf8",
  });
  return outputFiles[0].text.trim();
}

const hash = (text) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;

// An end tag inside a string of the script would end the element.
const script = (await bundle("src/main.tsx")).replaceAll("</script", "<\\/script");
const style = await bundle("style/main.css");
const html = (await readFile(here("src/index.html"), "utf8"))
  .replace("/*style*/", () => style)
  .replace("/*script*/", () => script);
if (html.split("<script").length !== 2 || html.split("<style").length !== 2) {
  throw new Error("index.html: one script and one style are allowed");
}
const size = Buffer.byteLength(html);
if (size > LIMIT) throw new Error(`dist/index.html: ${size} bytes, at most ${LIMIT} are allowed`);

const policy = [
  "default-src 'none'",
  `script-src ${hash(script)}`,
  `style-src ${hash(style)}`,
  "connect-src 'self'",
  "img-src data:",
  "base-uri 'none'",
  "form-action 'none'",
  "frame-ancestors 'none'",
];
await mkdir(here("dist"), { recursive: true });
await writeFile(here("dist/index.html"), html);
await writeFile(here("dist/csp.txt"), policy.join("; "));
console.log(`dist/index.html: ${size} bytes`);
