// What the heads of the last reply look at: a matrix, its tokens, and the heads of a layer.
import { batch, computed, effect, signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { messageOf, post, promptOf } from "./api";
import type { Attention as Answer } from "./contract";
import { Fault, number, percent } from "./controls";
import { colourOf, decode, paint, warmth } from "./heat";
import { planText } from "./plan";
import { current, model, theme } from "./store";
import { inLine, Strip, type Look } from "./strip";
import { running } from "./talk";

interface Seen extends Answer {
  matrix: Int8Array;
  negative: boolean;
}

const layer = signal(0);
const head = signal(0);
const seen = signal<Seen | null>(null);
const fault = signal("");
const busy = signal(false);
/** The token that is looked from (its row), or to (its column). */
const token = signal(0);
const direction = signal<"to" | "from">("to");
/** The cell of the matrix under the pointer or the keys. */
const cell = signal<{ query: number; key: number } | null>(null);

const source = computed(() => {
  const chat = current.value;
  const at = chat?.messages.findLastIndex((message) => message.role === "assistant" && message.content) ?? -1;
  const message = chat?.messages[at];
  if (!chat || !message || message.live) return null;
  return { system: chat.system, turns: chat.messages.slice(0, at), message };
});

const answers = new Map<string, Seen>();
// A matrix of 1024 tokens is 1 MiB.
const MOST_ANSWERS = 32;
let abort: AbortController | null = null;

async function load(body: Record<string, unknown>) {
  const name = JSON.stringify(body);
  abort?.abort();
  let answer = answers.get(name);
  if (!answer) {
    abort = new AbortController();
    const { signal } = abort;
    busy.value = true;
    try {
      const got = await post<Answer>("/qkov/attention", body, signal);
      const matrix = decode(got.weights);
      answer = { ...got, matrix, negative: matrix.some((weight) => weight < 0), weights: "" };
    } catch (error) {
      if (signal.aborted) return;
      batch(() => {
        fault.value = messageOf(error);
        seen.value = null;
        busy.value = false;
      });
      return;
    }
    if (answers.size >= MOST_ANSWERS) answers.delete(answers.keys().next().value!);
    answers.set(name, answer);
  }
  batch(() => {
    const n = answer.tokens.length;
    if (seen.value?.tokens.length !== n) token.value = n - 1;
    fault.value = "";
    busy.value = false;
    cell.value = null;
    seen.value = answer;
  });
}

function follow() {
  return effect(() => {
    const [from, about] = [source.value, model.value];
    if (!from || !about) {
      seen.value = null;
      return;
    }
    const { system, turns, message } = from;
    const prompt = promptOf(about.chat, system, turns);
    void load({ ...prompt, reply: message.content, qkov: message.plan ?? {}, layer: layer.value, head: head.value });
  });
}

/** With more tokens than this, a cell is smaller than a pixel on most screens, and is better blended than left out. */
const SHARP = 560;

const weightAt = ({ matrix, tokens, max }: Seen, query: number, key: number) =>
  (matrix[query * tokens.length + key]! / 127) * max;

function Readout({ of }: { of: Seen }) {
  const here = cell.value;
  return (
    <p id="cell" aria-live="polite">
      {here ? (
        <>
          <b class="mono">{inLine(of.tokens[here.query]!)}</b> → <b class="mono">{inLine(of.tokens[here.key]!)}</b>{" "}
          <span>{number(weightAt(of, here.query, here.key))}</span>
        </>
      ) : (
        <span class="muted">Rows are queries, columns are keys. Point at a cell, or click for its row.</span>
      )}
    </p>
  );
}

function Matrix({ of }: { of: Seen }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const n = of.tokens.length;
  useEffect(() => {
    paint(canvas.current!, of.matrix, n, colourOf("--paper"), colourOf("--accent"), colourOf("--contrary"));
  }, [of, theme.value]);
  const at = (event: PointerEvent | MouseEvent) => {
    const box = canvas.current!.getBoundingClientRect();
    const index = (part: number) => Math.max(0, Math.min(n - 1, Math.floor(part * n)));
    return { query: index((event.clientY - box.top) / box.height), key: index((event.clientX - box.left) / box.width) };
  };
  const move = (down: number, right: number) => {
    const { query, key } = cell.value ?? { query: token.value, key: 0 };
    const within = (x: number) => Math.max(0, Math.min(n - 1, x));
    cell.value = { query: within(query + down), key: within(key + right) };
  };
  const keys: Record<string, () => void> = {
    ArrowUp: () => move(-1, 0),
    ArrowDown: () => move(1, 0),
    ArrowLeft: () => move(0, -1),
    ArrowRight: () => move(0, 1),
    Home: () => move(0, -n),
    End: () => move(0, n),
    Enter: () => (token.value = cell.value?.query ?? token.value),
  };
  const here = cell.value;
  const place = (index: number) => `${(100 * (index + 0.5)) / n}%`;
  return (
    <figure class="matrix">
      <div class="frame">
        <canvas
          ref={canvas}
          class={n > SHARP ? "fine" : undefined}
          tabIndex={0}
          role="application"
          aria-label={`Attention weights, ${n} queries by ${n} keys. Arrow keys go from cell to cell, Enter chooses the query.`}
          aria-describedby="cell"
          onPointerMove={(event) => (cell.value = at(event))}
          onPointerLeave={() => (cell.value = null)}
          onClick={(event) => (token.value = at(event).query)}
          onBlur={() => (cell.value = null)}
          onKeyDown={(event) => {
            const act = keys[event.key];
            if (!act) return;
            event.preventDefault();
            act();
          }}
        />
        <i class="line across" style={{ top: place(here?.query ?? token.value) }} />
        {here && <i class="line down" style={{ left: place(here.key) }} />}
        <i class="line end" style={{ top: `${(100 * of.n_prompt) / n}%` }} title="the reply begins" />
      </div>
      <figcaption>
        <Readout of={of} />
        <Legend of={of} />
      </figcaption>
    </figure>
  );
}

function Legend({ of }: { of: Seen }) {
  return (
    <p class="legend">
      {of.negative && (
        <>
          −{number(of.max)} <i class="ramp contrary" aria-hidden="true" />
        </>
      )}
      0 <i class="ramp" aria-hidden="true" /> {number(of.max)}
      <span class="muted">colour as √weight</span>
    </p>
  );
}

function Heads({ of }: { of: Seen }) {
  const mostEntropy = Math.max(...of.entropy, 1e-9);
  const bar = (part: number) => ({ "--part": Math.max(0, Math.min(1, part)).toFixed(3) });
  return (
    <div class="heads">
      <table>
        <caption>Heads of layer {of.layer}</caption>
        <thead>
          <tr>
            <th scope="col">head</th>
            <th scope="col">entropy, nats</th>
            <th scope="col">on the first token</th>
          </tr>
        </thead>
        <tbody>
          {of.entropy.map((entropy, index) => {
            const first = of.first[index]!;
            return (
              <tr class={index === head.value ? "here" : undefined} onClick={() => (head.value = index)}>
                <th scope="row">
                  <button type="button" aria-pressed={index === head.value} aria-label={`Head ${index}`}>
                    {index}
                  </button>
                </th>
                <td>
                  <span class="figure">{number(entropy)}</span>
                  <i class="bar" style={bar(entropy / mostEntropy)} />
                </td>
                <td>
                  <span class="figure">{percent(first)}</span>
                  <i class={`bar${first < 0 ? " contrary" : ""}`} style={bar(Math.abs(first))} />
                </td>
              </tr>
            );
          })}
        </tbody>
      </table>
    </div>
  );
}

function Tokens({ of }: { of: Seen }) {
  const chosen = Math.min(token.value, of.tokens.length - 1);
  const weight = (i: number) => (direction.value === "to" ? weightAt(of, chosen, i) : weightAt(of, i, chosen));
  // Against the largest in view, so that a row of small weights can be read too.
  const most = of.tokens.reduce((most, _, i) => Math.max(most, Math.abs(weight(i))), 0);
  const look = (i: number): Look => ({
    heat: warmth(weight(i), most),
    opposed: weight(i) < 0,
    mark: i === of.n_prompt ? "begins" : "",
    label: `${inLine(of.tokens[i]!)}, ${number(weight(i))}`,
  });
  return (
    <div class="tokens">
      <div class="above">
        <h2>
          {direction.value === "to" ? "What it looks at" : "What looks at it"}: <b class="mono">{inLine(of.tokens[chosen]!)}</b>
        </h2>
        <div class="choice" role="group" aria-label="Direction">
          <button type="button" aria-pressed={direction.value === "to"} onClick={() => (direction.value = "to")}>
            its keys
          </button>
          <button type="button" aria-pressed={direction.value === "from"} onClick={() => (direction.value = "from")}>
            its queries
          </button>
        </div>
      </div>
      <Strip
        name="attended"
        label="Tokens, coloured by weight; arrow keys choose one"
        tokens={of.tokens}
        look={look}
        chosen={chosen}
        onChoose={(index) => (token.value = index)}
        note={(i) => (
          <p>
            <b class="mono">{inLine(of.tokens[i]!)}</b> <span>weight {number(weight(i))}</span>
          </p>
        )}
      />
    </div>
  );
}

function Stepper({ label, value, n, onChange }: { label: string; value: number; n: number; onChange: (value: number) => void }) {
  return (
    <div class="stepper" role="group" aria-label={label}>
      <span aria-hidden="true">{label}</span>
      <button type="button" aria-label={`Previous ${label}`} disabled={value <= 0} onClick={() => onChange(value - 1)}>
        ‹
      </button>
      <select aria-label={label} value={String(value)} onChange={(event) => onChange(Number(event.currentTarget.value))}>
        {Array.from({ length: n }, (_, i) => (
          <option value={String(i)}>{i}</option>
        ))}
      </select>
      <button type="button" aria-label={`Next ${label}`} disabled={value >= n - 1} onClick={() => onChange(value + 1)}>
        ›
      </button>
    </div>
  );
}

export function Attention() {
  useEffect(follow, []);
  const [about, of, from] = [model.value, seen.value, source.value];
  if (!about) return null;
  if (!from) {
    return (
      <section class="attention" aria-label="Attention">
        <p class="muted">{running.value ? "Waits for the end of the reply." : "There is no reply yet to look at."} <a href="#chat">To the chat</a></p>
      </section>
    );
  }
  return (
    <section class="attention" aria-label="Attention" aria-busy={busy.value}>
      <div class="above">
        <Stepper label="Layer" value={layer.value} n={about.n_layers} onChange={(value) => (layer.value = value)} />
        <Stepper label="Head" value={head.value} n={of?.n_heads ?? about.n_heads} onChange={(value) => (head.value = value)} />
        <p class="muted mono">{planText(from.message.plan ?? {})}</p>
      </div>
      {fault.value && <Fault text={fault.value} />}
      {!of && busy.value && <p class="muted" role="status">The model reads the conversation…</p>}
      {of && (
        <div class="views">
          <Matrix of={of} />
          <div>
            <Heads of={of} />
            <Tokens of={of} />
          </div>
        </div>
      )}
    </section>
  );
}
