// One prompt, two variants: both replies side by side, then how far the second is from the first at each token of the first's reply.
import { signal } from "@preact/signals";
import { messageOf, post, promptOf, reply } from "./api";
import type { Choice, Comparison, Plan, Prompt, Scored, Timings } from "./contract";
import { CopyButton, Fault, Growing, number, percent } from "./controls";
import { differing } from "./diff";
import { PlanPicker, planText } from "./plan";
import { current, model, settings } from "./store";
import { inLine, Strip, visible, type Look } from "./strip";
import { announcement, eachFrame, Speedometer } from "./talk";

interface Pane {
  plan: Plan;
  pieces: string[];
  timings?: Timings;
  speed: number | null;
  error?: string;
  live: boolean;
}

const SIDES = [0, 1] as const;
const LETTERS = ["A", "B"] as const;
const blank = (plan: Plan): Pane => ({ plan, pieces: [], speed: null, live: false });

const ask = signal("");
const panes = signal<[Pane, Pane]>([blank({}), blank({})]);
const abort = signal<AbortController | null>(null);
/** What was asked last, with the seed of both. */
const asked = signal<{ prompt: Prompt; seed: number } | null>(null);
const scored = signal<{ state: "none" | "busy" | "done"; result?: Comparison; error?: string }>({ state: "none" });
const shows = signal<"differences" | "divergence">("differences");

function changePane(side: 0 | 1, change: Partial<Pane>) {
  const [a, b] = panes.value;
  panes.value = side === 0 ? [{ ...a, ...change }, b] : [a, { ...b, ...change }];
}

async function write(side: 0 | 1, prompt: Prompt, seed: number, signal: AbortSignal) {
  const pieces: string[] = [];
  let timings: Timings | undefined;
  const meter = new Speedometer();
  const frames = eachFrame(() => changePane(side, { pieces: [...pieces], speed: meter.speed, timings }));
  let error: string | undefined;
  try {
    for await (const piece of reply(prompt, panes.value[side].plan, { ...settings.value.sampling, seed }, signal)) {
      if (piece.text) {
        pieces.push(piece.text);
        meter.count();
      }
      timings = piece.timings ?? timings;
      frames.ask();
    }
  } catch (fault) {
    error = messageOf(fault);
  }
  frames.end();
  changePane(side, { live: false, error });
}

async function measure(signal?: AbortSignal) {
  const [a, b] = panes.value;
  const text = a.pieces.join("");
  if (!asked.value || !text) return;
  scored.value = { state: "busy" };
  try {
    const body = { ...asked.value.prompt, reply: text, variants: [a.plan, b.plan] };
    const result = await post<Comparison>("/qkov/compare", body, signal);
    scored.value = { state: "done", result };
    shows.value = "divergence";
    announcement.value = `Mean divergence ${number(result.mean_kl)} nats per token.`;
  } catch (error) {
    scored.value = signal?.aborted ? { state: "none" } : { state: "none", error: messageOf(error) };
  }
}

async function run() {
  if (abort.value || !ask.value.trim() || !model.value) return;
  const control = new AbortController();
  abort.value = control;
  const prompt = promptOf(model.value.chat, current.value?.system ?? "", [{ role: "user", content: ask.value }]);
  // Both draw with the same seed, so that what differs comes from the variants.
  const seed = Number(settings.value.sampling["seed"] ?? Math.floor(Math.random() * 2 ** 31));
  asked.value = { prompt, seed };
  scored.value = { state: "none" };
  shows.value = "differences";
  panes.value = [{ ...blank(panes.value[0].plan), live: true }, { ...blank(panes.value[1].plan), live: true }];
  await Promise.all(SIDES.map((side) => write(side, prompt, seed, control.signal)));
  if (!control.signal.aborted && !panes.value.some((pane) => pane.error)) await measure(control.signal);
  abort.value = null;
}

export function stopComparing() {
  abort.value?.abort();
}

function Words({ side, differ }: { side: 0 | 1; differ: boolean[] }) {
  const { pieces, live } = panes.value[side];
  return (
    <div class={live ? "strip live" : "strip"}>
      {pieces.map((piece, i) => (differ[i] ? <mark key={i}>{visible(piece)}</mark> : piece))}
    </div>
  );
}

function Tops({ token }: { token: Scored }) {
  const list = (choices: Choice[], side: 0 | 1) => (
    <table>
      <caption>
        {LETTERS[side]} <span>gives it {percent(Math.exp(token.logprobs[side]))}</span>
      </caption>
      <tbody>
        {choices.map((choice) => (
          <tr class={choice.text === token.text ? "same" : undefined}>
            <td class="mono">{inLine(choice.text)}</td>
            <td>{percent(Math.exp(choice.logprob))}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
  return (
    <>
      <p>
        <b class="mono">{inLine(token.text)}</b> <span>KL {number(token.kl)} nats</span>
      </p>
      <div class="tops">{SIDES.map((side) => list(token.top[side], side))}</div>
    </>
  );
}

/** Full colour from here on, in nats. Small divergences are what is looked for, so colour grows as the root. */
const FULL = 2;

function Divergence({ result }: { result: Comparison }) {
  const look = (i: number): Look => {
    const { text, kl } = result.tokens[i]!;
    return { heat: Math.min(1, Math.sqrt(Math.max(0, kl) / FULL)), label: `${inLine(text)}, ${number(kl)} nats` };
  };
  return (
    <Strip
      name="kl"
      label="Reply of A, coloured by divergence"
      tokens={result.tokens.map((token) => token.text)}
      look={look}
      note={(i) => <Tops token={result.tokens[i]!} />}
    />
  );
}

function PaneView({ side, differ }: { side: 0 | 1; differ: boolean[] }) {
  const pane = panes.value[side];
  const { result } = scored.value;
  const speed = pane.live ? pane.speed : pane.timings?.predicted_per_second;
  const coloured = side === 0 && result && shows.value === "divergence";
  return (
    <section class="pane" aria-label={`Variant ${LETTERS[side]}`}>
      <h2>
        <span class="letter">{LETTERS[side]}</span> <span class="mono">{planText(pane.plan)}</span>
      </h2>
      <details class="variant">
        <summary>Change variant {LETTERS[side]}</summary>
        <PlanPicker plan={pane.plan} onChange={(plan) => {
            changePane(side, { plan });
            scored.value = { state: "none" };
          }} />
      </details>
      {coloured ? <Divergence result={result} /> : <Words side={side} differ={differ} />}
      {pane.error && <Fault text={pane.error} />}
      <footer>
        {speed ? <span>{number(speed)} tok/s</span> : null}
        {pane.timings && <span>{pane.timings.predicted_n} tokens</span>}
        {result && <span>perplexity {number(result.perplexity[side])}</span>}
        {pane.pieces.length > 0 && !pane.live && <CopyButton text={pane.pieces.join("")} />}
      </footer>
    </section>
  );
}

function Verdict() {
  const { state, result, error } = scored.value;
  const [a] = panes.value;
  if (error) return <Fault text={error} again={() => void measure()} />;
  if (state === "busy") return <p class="muted" role="status">Measuring divergence…</p>;
  if (!result) {
    if (abort.value || a.live || !a.pieces.length || !asked.value) return null;
    return (
      <button type="button" class="plain" onClick={() => void measure()}>
        Measure divergence on A's reply
      </button>
    );
  }
  return (
    <div class="verdict">
      <dl>
        <div>
          <dt>mean KL(A ‖ B)</dt>
          <dd>{number(result.mean_kl)} nats</dd>
        </div>
        {SIDES.map((side) => (
          <div>
            <dt>perplexity {LETTERS[side]}</dt>
            <dd>{number(result.perplexity[side])}</dd>
          </div>
        ))}
        <div>
          <dt>seed of both</dt>
          <dd>{asked.value?.seed}</dd>
        </div>
      </dl>
      <div class="choice" role="group" aria-label="What A's reply shows">
        {(["divergence", "differences"] as const).map((what) => (
          <button type="button" aria-pressed={shows.value === what} onClick={() => (shows.value = what)}>
            {what}
          </button>
        ))}
      </div>
      {shows.value === "divergence" && (
        <p class="legend">
          0 <i class="ramp" aria-hidden="true" /> {FULL} nats or more
        </p>
      )}
    </div>
  );
}

export function Compare() {
  const busy = abort.value !== null;
  const [inA, inB] = differing(panes.value[0].pieces, panes.value[1].pieces);
  return (
    <section class="compare" aria-label="Compare">
      <form
        class="composer"
        onSubmit={(event) => {
          event.preventDefault();
          void run();
        }}
      >
        <div class="box">
          <Growing id="ask" label="Prompt for both variants" value={ask.value} placeholder="One prompt for both variants" onText={(text) => (ask.value = text)} onSend={() => void run()} />
          {busy ? (
            <button type="button" class="main" onClick={stopComparing}>
              Stop
            </button>
          ) : (
            <button type="submit" class="main" disabled={!ask.value.trim() || !model.value}>
              Compare
            </button>
          )}
        </div>
      </form>
      <Verdict />
      <div class="panes">
        <PaneView side={0} differ={inA} />
        <PaneView side={1} differ={inB} />
      </div>
    </section>
  );
}
