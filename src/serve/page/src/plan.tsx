// Choosing norm, form and mask: one entry with its parameters, or free text with selectors of layers and heads.
import { useId, useState } from "preact/hooks";
import type { Entry, Parameter, Part, Plan } from "./contract";
import { model } from "./store";

const PARTS: { part: Part; label: string; registry: "norms" | "forms" | "masks"; example: string }[] = [
  { part: "norm", label: "Normalizer", registry: "norms", example: "*=softmax;0-3=sigmoid" },
  { part: "form", label: "Form", registry: "forms", example: "*=split;2-5=lowrank:ratio=0.5" },
  { part: "mask", label: "Mask", registry: "masks", example: "*=causal;0-2=prefix" },
];
const SELECTORS = "\0selectors";

interface Choice {
  entry: Entry;
  given: Record<string, string>;
}

/** `name:a=1,b=2` with a known name and known parameters; anything else is free text. */
export function readChoice(text: string, entries: Entry[]): Choice | null {
  const [, name, list] = /^([^:=;]+)(?::(.*))?$/s.exec(text) ?? [];
  const entry = entries.find((one) => one.name === name);
  if (!entry) return null;
  const given: Record<string, string> = {};
  for (const pair of list ? list.split(",") : []) {
    const [, key, value] = /^([^=]+)=(.*)$/s.exec(pair) ?? [];
    if (!key || value === undefined || !entry.parameters.some((one) => one.name === key)) return null;
    given[key] = value;
  }
  return { entry, given };
}

function writeChoice({ entry, given }: Choice): string {
  const pairs = Object.entries(given).filter(([, value]) => value.trim());
  return entry.name + (pairs.length ? `:${pairs.map(([key, value]) => `${key}=${value.trim()}`).join(",")}` : "");
}

function Rows({ choice, names, onChange }: { choice: Choice; names: Parameter[]; onChange: (text: string) => void }) {
  return (
    <>
      {names.map(({ name, about, allowed, default: usual }) => (
        <label key={name} class="row">
          <span>
            {name} <small>{[about, allowed].filter(Boolean).join("; ")}</small>
          </span>
          <input
            type="text"
            inputMode="decimal"
            spellcheck={false}
            value={choice.given[name] ?? ""}
            placeholder={usual === null || usual === undefined ? "" : String(usual)}
            onChange={(event) =>
              onChange(writeChoice({ ...choice, given: { ...choice.given, [name]: event.currentTarget.value } }))
            }
          />
        </label>
      ))}
    </>
  );
}

/** Parameters of the entry; those that every entry of the registry has are folded away. */
function Parameters({ choice, entries, onChange }: { choice: Choice; entries: Entry[]; onChange: (text: string) => void }) {
  const everywhere = (name: string) => entries.every((entry) => entry.parameters.some((one) => one.name === name));
  const common = choice.entry.parameters.filter(({ name }) => everywhere(name));
  const own = choice.entry.parameters.filter(({ name }) => !everywhere(name));
  return (
    <div class="parameters">
      <Rows choice={choice} names={own} onChange={onChange} />
      {common.length > 0 && (
        <details open={common.some(({ name }) => choice.given[name])}>
          <summary>what all have</summary>
          <Rows choice={choice} names={common} onChange={onChange} />
        </details>
      )}
    </div>
  );
}

function PartPicker(props: { value: string; own: string; entries: Entry[]; label: string; example: string; onChange: (text: string) => void }) {
  const choice = readChoice(props.value, props.entries);
  const [free, setFree] = useState(props.value !== "" && !choice);
  const note = useId();
  const pick = (name: string) => {
    setFree(name === SELECTORS);
    if (name !== SELECTORS) props.onChange(name);
  };
  return (
    <div class="part">
      <label for={`${note}-of`}>{props.label}</label>
      <select
        id={`${note}-of`}
        value={free ? SELECTORS : (choice?.entry.name ?? "")}
        aria-describedby={note}
        onChange={(event) => pick(event.currentTarget.value)}
      >
        <option value="">as the model ({props.own || "its own"})</option>
        <option value={SELECTORS}>by layers and heads…</option>
        {props.entries.map((entry) => (
          <option value={entry.name}>{entry.name}</option>
        ))}
      </select>
      {free ? (
        <input
          type="text"
          class="mono"
          aria-label={`${props.label}, by layers and heads`}
          spellcheck={false}
          value={props.value}
          placeholder={props.example}
          onChange={(event) => props.onChange(event.currentTarget.value.trim())}
        />
      ) : (
        choice && choice.entry.parameters.length > 0 && <Parameters choice={choice} entries={props.entries} onChange={props.onChange} />
      )}
      <small id={note}>{free ? "selector=name:parameter=value; and so on" : choice?.entry.about}</small>
    </div>
  );
}

export function PlanPicker({ plan, onChange }: { plan: Plan; onChange: (plan: Plan) => void }) {
  if (!model.value) return null;
  const { plan: own, ...registries } = model.value;
  return (
    <>
      {PARTS.map(({ part, label, registry, example }) => (
        <PartPicker
          key={part}
          value={plan[part] ?? ""}
          own={own[part] ?? ""}
          entries={registries[registry]}
          label={label}
          example={example}
          onChange={(text) => {
            const { [part]: _, ...others } = plan;
            onChange(text ? { ...others, [part]: text } : others);
          }}
        />
      ))}
    </>
  );
}

export function planText(plan: Plan): string {
  return Object.values(plan).filter(Boolean).join(" · ") || "as the model";
}
