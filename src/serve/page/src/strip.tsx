// A text as its tokens, one tab stop: arrow keys go from token to token, and a note stands beside the one that is looked at.
import type { ComponentChildren } from "preact";
import { useLayoutEffect, useRef, useState } from "preact/hooks";

/** How a token looks: `heat` from 0 to 1, of the second colour where `opposed`. */
export interface Look {
  heat?: number;
  opposed?: boolean;
  mark?: string;
  label: string;
}

interface Props {
  name: string;
  label: string;
  tokens: string[];
  look: (index: number) => Look;
  /** The token that stays chosen; for strips of which one is chosen. */
  chosen?: number;
  onChoose?: (index: number) => void;
  note?: (index: number) => ComponentChildren;
}

/** Breaks of lines are seen and kept; other control characters have pictures in Unicode. */
export function visible(text: string): ComponentChildren {
  const pictured = text.replace(/[\x00-\x08\x0b-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0))) || "∅";
  if (!pictured.includes("\n")) return pictured;
  return pictured.split(/(\n)/).map((part) => (part === "\n" ? <span class="break">↵{part}</span> : part));
}

/** The same on one line. */
export function inLine(text: string): string {
  const short = text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");
  return short || "∅";
}

function Note({ children, token, id }: { children: ComponentChildren; token: string; id: string }) {
  const box = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const at = document.getElementById(token)?.getClientRects()[0];
    const note = box.current!;
    if (!at) return;
    const below = at.bottom + 6 + note.offsetHeight < window.innerHeight || at.top < note.offsetHeight + 6;
    note.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - note.offsetWidth - 8))}px`;
    note.style.top = `${below ? at.bottom + 6 : at.top - 6 - note.offsetHeight}px`;
  });
  return (
    <div class="note" role="tooltip" id={id} ref={box}>
      {children}
    </div>
  );
}

function Token(props: { id: string; index: number; text: string; look: Look; picked: boolean; more: string; noteId?: string }) {
  const { heat = 0, opposed, mark = "", label } = props.look;
  const classes = ["token", mark, opposed && "opposed", heat > 0 && "warm", props.more];
  return (
    <span
      id={props.id}
      data-index={props.index}
      role="option"
      aria-selected={props.picked}
      aria-label={label}
      aria-describedby={props.noteId}
      class={classes.filter(Boolean).join(" ")}
      style={heat > 0 ? { "--heat": `${(heat * 100).toFixed(1)}%` } : undefined}
    >
      {visible(props.text)}
    </span>
  );
}

function indexOf(target: EventTarget | null): number | null {
  const found = (target as HTMLElement | null)?.closest?.<HTMLElement>("[data-index]");
  return found ? Number(found.dataset["index"]) : null;
}

export function Strip({ name, label, tokens, look, chosen, onChoose, note }: Props) {
  const [at, setAt] = useState<number | null>(null);
  const [focused, setFocused] = useState(chosen ?? 0);
  const box = useRef<HTMLDivElement>(null);
  const id = (index: number) => `${name}-${index}`;
  const go = (index: number) => {
    const to = Math.max(0, Math.min(tokens.length - 1, index));
    setFocused(to);
    setAt(to);
    onChoose?.(to);
    document.getElementById(id(to))?.scrollIntoView({ block: "nearest" });
  };
  const here = Math.min(onChoose ? (chosen ?? 0) : focused, tokens.length - 1);
  const keys: Record<string, () => void> = {
    ArrowRight: () => go(here + 1),
    ArrowLeft: () => go(here - 1),
    ArrowDown: () => go(here + 10),
    ArrowUp: () => go(here - 10),
    Home: () => go(0),
    End: () => go(tokens.length - 1),
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key === "Escape" && at !== null) {
      event.stopPropagation();
      return setAt(null);
    }
    const act = keys[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  };
  return (
    <>
      <div
        ref={box}
        class="strip"
        role="listbox"
        aria-label={label}
        tabIndex={0}
        aria-activedescendant={tokens.length ? id(here) : undefined}
        onFocus={() => box.current!.matches(":focus-visible") && setAt(here)}
        onBlur={() => setAt(null)}
        onPointerMove={(event) => {
          const index = indexOf(event.target);
          if (index !== at) setAt(index);
        }}
        onPointerLeave={() => setAt(null)}
        onClick={(event) => {
          const index = indexOf(event.target);
          if (index !== null) go(index);
        }}
        onKeyDown={onKeyDown}
      >
        {tokens.map((token, index) => (
          <Token
            key={index}
            id={id(index)}
            index={index}
            text={token}
            look={look(index)}
            picked={index === here}
            more={`${index === chosen ? "chosen" : ""} ${index === at ? "at" : ""}`.trim()}
            noteId={note && index === at ? `${name}-note` : undefined}
          />
        ))}
      </div>
      {note && at !== null && at < tokens.length && (
        <Note token={id(at)} id={`${name}-note`}>
          {note(at)}
        </Note>
      )}
    </>
  );
}
