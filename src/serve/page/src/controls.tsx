// Small parts that several views use.
import { useEffect, useRef, useState } from "preact/hooks";

async function copy(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages that do not come over https, or from this machine, have no clipboard.
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "unseen";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

export function CopyButton({ text }: { text: string }) {
  const [told, tell] = useState("");
  useEffect(() => {
    if (!told) return;
    const timer = setTimeout(() => tell(""), 1500);
    return () => clearTimeout(timer);
  }, [told]);
  return (
    <button type="button" class="quiet" onClick={async () => tell((await copy(text)) ? "Copied" : "Not copied")}>
      <span aria-live="polite">{told || "Copy"}</span>
    </button>
  );
}

export function Fault({ text, again }: { text: string; again?: () => void }) {
  return (
    <div class="fault" role="alert">
      <span>{text}</span>
      {again && (
        <button type="button" class="quiet" onClick={again}>
          Try again
        </button>
      )}
    </div>
  );
}

/** A text field that is as high as its text. */
export function Growing(props: {
  id: string;
  label: string;
  value: string;
  placeholder?: string;
  onText: (text: string) => void;
  onSend?: () => void;
}) {
  const area = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    const field = area.current!;
    field.style.height = "0";
    field.style.height = `${Math.min(field.scrollHeight + 2, window.innerHeight * 0.4)}px`;
  }, [props.value]);
  return (
    <textarea
      id={props.id}
      ref={area}
      rows={1}
      aria-label={props.label}
      placeholder={props.placeholder}
      value={props.value}
      spellcheck={false}
      onInput={(event) => props.onText(event.currentTarget.value)}
      onKeyDown={(event) => {
        // While an input method composes a word, Enter ends the word.
        if (event.key !== "Enter" || event.shiftKey || event.isComposing || !props.onSend) return;
        event.preventDefault();
        props.onSend();
      }}
    />
  );
}

const fixed = (digits: number) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const [one, two, three] = [fixed(1), fixed(2), fixed(3)];

export function number(x: number): string {
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size < 0.001) return x.toExponential(1);
  return size >= 100 ? Math.round(x).toLocaleString("en") : (size >= 10 ? one : size >= 1 ? two : three).format(x);
}

export function percent(x: number): string {
  return `${(100 * x).toFixed(Math.abs(x) < 0.1 ? 1 : 0)} %`;
}

export function large(n: number): string {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "K"]] as const) {
    if (n >= size) return `${(n / size).toFixed(n / size < 100 ? 1 : 0)} ${unit}`;
  }
  return String(n);
}

export function bytes(n: number): string {
  for (const [size, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]] as const) {
    if (n >= size) return `${(n / size).toFixed(1)} ${unit}`;
  }
  return `${n} B`;
}
