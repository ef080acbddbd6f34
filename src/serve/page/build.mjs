// Makes dist/index.html, the whole page in one file: one script and one style, whose hashes are all that the server allows.
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

await mkdir(here("dist"), { recursive: true });
await writeFile(here("dist/index.html"), html);
// What is inside the page asks that these go with it.
const { dependencies } = JSON.parse(await readFile(here("package.json"), "utf8"));
const licenses = Object.entries(dependencies).map(async ([name, version]) => {
  const text = await readFile(here(`node_modules/${name}/LICENSE`), "utf8").catch(() => readFile(here(`node_modules/${name}/LICENSE.md`), "utf8"));
  return `${name} ${version}\n\n${text.trim()}\n`;
});
await writeFile(here("dist/LICENSES.txt"), (await Promise.all(licenses)).join("\n\n"));
console.log(`dist/index.html: ${size} bytes`);
