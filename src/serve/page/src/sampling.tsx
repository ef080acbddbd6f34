// How tokens are drawn: what differs from the server's defaults is kept and sent, nothing else.
import { useState } from "preact/hooks";
import type { Value } from "./contract";
import { changeSettings, model, settings } from "./store";

interface Knob {
  name: string;
  label: string;
  about: string;
  kind?: "whole" | "switch" | "text" | "list" | "grammar";
  min?: number;
  max?: number;
}

const GROUPS: { title: string; open?: boolean; knobs: Knob[] }[] = [
  {
    title: "Sampling",
    open: true,
    knobs: [
      { name: "temperature", label: "Temperature", about: "0: always the likeliest token", min: 0 },
      { name: "top_k", label: "Top k", about: "keeps the k likeliest tokens; 0: all", kind: "whole", min: 0 },
      { name: "top_p", label: "Top p", about: "keeps the likeliest tokens up to this probability together", min: 0, max: 1 },
      { name: "min_p", label: "Min p", about: "keeps tokens of at least this probability, relative to the likeliest", min: 0, max: 1 },
      { name: "seed", label: "Seed", about: "the same seed gives the same text", kind: "whole", min: 0 },
      { name: "max_tokens", label: "Most tokens", about: "a reply ends after so many", kind: "whole", min: 1 },
    ],
  },
  {
    title: "More cuts",
    knobs: [
      { name: "typical_p", label: "Typical p", about: "keeps typical tokens up to this probability; 1: all", min: 0, max: 1 },
      { name: "top_n_sigma", label: "Top n sigma", about: "keeps tokens up to n standard deviations below the largest logit; 0: all", min: 0 },
      { name: "xtc_probability", label: "XTC probability", about: "how often XTC removes top choices; 0: never", min: 0, max: 1 },
      { name: "xtc_threshold", label: "XTC threshold", about: "probability from which XTC takes a token for a top choice", min: 0, max: 1 },
    ],
  },
  {
    title: "Repetition",
    knobs: [
      { name: "repeat_penalty", label: "Repeat penalty", about: "divides the logits of past tokens; 1: off", min: 0 },
      { name: "frequency_penalty", label: "Frequency penalty", about: "subtracted for every time a token occurred" },
      { name: "presence_penalty", label: "Presence penalty", about: "subtracted if a token occurred" },
      { name: "repeat_last_n", label: "Penalties look at", about: "past tokens", kind: "whole", min: 0 },
      { name: "dry_multiplier", label: "DRY multiplier", about: "strength against repeated sequences; 0: off", min: 0 },
      { name: "dry_base", label: "DRY base", about: "growth per repeated token", min: 0 },
      { name: "dry_allowed_length", label: "DRY allows", about: "longest repetition that is left alone, in tokens", kind: "whole", min: 0 },
    ],
  },
  {
    title: "Moving temperature",
    knobs: [
      { name: "dynatemp_range", label: "Range", about: "how far the temperature follows the model's uncertainty; 0: not", min: 0 },
      { name: "dynatemp_exponent", label: "Exponent", about: "of the uncertainty" },
      { name: "mirostat", label: "Mirostat 2", about: "instead of what keeps or removes tokens", kind: "switch" },
      { name: "mirostat_tau", label: "Mirostat tau", about: "the surprise that is aimed at, in bits", min: 0 },
      { name: "mirostat_eta", label: "Mirostat eta", about: "how fast it learns", min: 0 },
    ],
  },
  {
    title: "Order and form",
    knobs: [
      { name: "samplers", label: "Samplers", about: "in their order, with commas; those left out are off", kind: "list" },
      { name: "stop", label: "Stop at", about: "a text at which a reply ends", kind: "text" },
      { name: "ignore_eos", label: "Ignore the end", about: "goes on after the model has ended", kind: "switch" },
      { name: "grammar", label: "Grammar", about: "GBNF that replies must follow", kind: "grammar" },
    ],
  },
];

/** What was typed, as the server takes it; undefined where that is nothing. */
function read(knob: Knob, text: string): Value | undefined | Error {
  const trimmed = text.trim();
  if (!trimmed) return undefined;
  if (knob.kind === "text") return text;
  if (knob.kind === "grammar") return text;
  if (knob.kind === "list") return trimmed.split(/[\s,;]+/).filter(Boolean);
  const value = Number(trimmed.replace(",", "."));
  if (!Number.isFinite(value) || (knob.kind === "whole" && !Number.isInteger(value))) {
    return new Error(knob.kind === "whole" ? "a whole number" : "a number");
  }
  if (knob.min !== undefined && value < knob.min) return new Error(`${knob.min} or more`);
  if (knob.max !== undefined && value > knob.max) return new Error(`${knob.max} or less`);
  return value;
}

function set(name: string, value: Value | undefined) {
  const { [name]: _, ...others } = settings.value.sampling;
  changeSettings({ sampling: value === undefined ? others : { ...others, [name]: value } });
}

const shown = (value: Value | null | undefined) => (Array.isArray(value) ? value.join(", ") : String(value ?? ""));

function Setting({ knob }: { knob: Knob }) {
  const [wrong, setWrong] = useState("");
  const own = settings.value.sampling[knob.name];
  const usual = model.value?.sampling[knob.name];
  const id = `set-${knob.name}`;
  const change = (text: string) => {
    const value = read(knob, text);
    setWrong(value instanceof Error ? value.message : "");
    if (!(value instanceof Error)) set(knob.name, value);
  };
  const common = { id, "aria-describedby": `${id}-about`, "aria-invalid": wrong ? true : undefined };
  return (
    <div class={`setting ${knob.kind ?? "real"}${own === undefined ? "" : " changed"}`}>
      <label for={id}>{knob.label}</label>
      {knob.kind === "switch" ? (
        <input
          {...common}
          type="checkbox"
          checked={Boolean(own ?? usual)}
          onChange={(event) => set(knob.name, event.currentTarget.checked === Boolean(usual) ? undefined : event.currentTarget.checked)}
        />
      ) : knob.kind === "grammar" ? (
        <textarea {...common} class="mono" rows={3} spellcheck={false} value={shown(own)} placeholder={'root ::= "yes" | "no"'} onChange={(event) => change(event.currentTarget.value)} />
      ) : (
        <input
          {...common}
          type="text"
          inputMode={knob.kind === "list" || knob.kind === "text" ? "text" : "decimal"}
          spellcheck={false}
          value={shown(own)}
          placeholder={shown(usual) || (knob.name === "seed" ? "random" : "")}
          onChange={(event) => change(event.currentTarget.value)}
        />
      )}
      <small id={`${id}-about`} class={wrong ? "wrong" : undefined}>
        {wrong || knob.about}
      </small>
    </div>
  );
}

/** Fields that this page does not know are shown by the type of their default. */
function unknownKnobs(): Knob[] {
  const known = new Set(GROUPS.flatMap((group) => group.knobs.map((knob) => knob.name)));
  return Object.entries(model.value?.sampling ?? {})
    .filter(([name]) => !known.has(name))
    .map(([name, usual]) => ({
      name,
      label: name.replaceAll("_", " "),
      about: "",
      kind: typeof usual === "boolean" ? "switch" : typeof usual === "string" ? "text" : Array.isArray(usual) ? "list" : undefined,
    }));
}

export function Sampling() {
  const others = unknownKnobs();
  const groups = others.length ? [...GROUPS, { title: "Others", knobs: others }] : GROUPS;
  const count = (knobs: Knob[]) => knobs.filter((knob) => settings.value.sampling[knob.name] !== undefined).length;
  return (
    <>
      {groups.map(({ title, open, knobs }) => (
        <details key={title} open={open}>
          <summary>
            {title}
            {count(knobs) > 0 && <span class="changes">{count(knobs)} changed</span>}
          </summary>
          {knobs.map((knob) => (
            <Setting key={knob.name} knob={knob} />
          ))}
        </details>
      ))}
      <button type="button" class="quiet" disabled={!Object.keys(settings.value.sampling).length} onClick={() => changeSettings({ sampling: {} })}>
        Back to the server's defaults
      </button>
    </>
  );
}
