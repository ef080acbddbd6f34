// The frame: header with figures, views, panels at the sides, the dialog for a key.
import { signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { giveKey, keyWanted } from "./api";
import { Attention } from "./attention";
import { Chat } from "./chat";
import { Compare, stopComparing } from "./compare";
import { bytes, Growing, number } from "./controls";
import { Conversations } from "./conversations";
import { PlanPicker } from "./plan";
import { Sampling } from "./sampling";
import { changeConversation, changeSettings, current, model, modelFault, settings, status, theme } from "./store";
import { announcement, liveSpeed, stop } from "./talk";

const VIEWS = { chat: Chat, compare: Compare, attention: Attention };
type View = keyof typeof VIEWS;
const FIELDS: Record<View, string> = { chat: "say", compare: "ask", attention: "view" };

const viewOf = (hash: string): View => (hash.slice(1) in VIEWS ? (hash.slice(1) as View) : "chat");
const view = signal<View>(viewOf(location.hash));
const wide = matchMedia("(min-width: 75rem)");
const panel = signal<"none" | "conversations" | "settings">("none");
const isWide = signal(wide.matches);

/** Panels stand beside the view where there is room, and over it where there is not. */
const over = () => !isWide.value && panel.value !== "none";

function togglePanel(which: "conversations" | "settings") {
  panel.value = panel.value === which ? "none" : which;
}

function closePanel() {
  if (!over()) return;
  const which = panel.value;
  panel.value = "none";
  document.getElementById(`open-${which}`)?.focus();
}

function Meters() {
  const now = status.value;
  const speed = liveSpeed.value ?? now?.tokens_per_second ?? 0;
  if (!now) return <p class="meters">{modelFault.value && <span class="wrong">offline</span>}</p>;
  const used = now.slots.reduce((sum, slot) => sum + slot.n_tokens, 0);
  const about = now.slots.map((slot, i) => `slot ${i}: ${slot.n_tokens} of ${now.n_ctx} tokens${slot.busy ? ", busy" : ""}`);
  return (
    <p class="meters" title={`${about.join("\n")}\n${bytes(now.cache_bytes)} of cache`}>
      <span class="speed">
        <b>{number(speed)}</b> tok/s
      </span>
      <span class="cache">
        <span>cache</span>
        <span class="slots" aria-hidden="true">
          {now.slots.map((slot, i) => (
            <i key={i} class={slot.busy ? "busy" : undefined} style={{ "--part": (slot.n_tokens / now.n_ctx).toFixed(3) }} />
          ))}
        </span>
        <b>{used.toLocaleString("en")}</b>
        <span class="of">{now.slots.length > 1 ? "tokens" : `of ${now.n_ctx.toLocaleString("en")}`}</span>
      </span>
      {now.queued > 0 && <span>{now.queued} waiting</span>}
    </p>
  );
}

function Header() {
  const next = theme.value === "dark" ? "light" : "dark";
  const toggle = (which: "conversations" | "settings", label: string) => (
    <button id={`open-${which}`} type="button" class="quiet" aria-expanded={panel.value === which} aria-controls={which} onClick={() => togglePanel(which)}>
      {label}
    </button>
  );
  return (
    <header class="top">
      <a class="skip" href={`#${view.value}`} onClick={(event) => { event.preventDefault(); document.getElementById(FIELDS[view.value])?.focus(); }}>
        Skip to input
      </a>
      <h1>
        qk<span>ov</span>
      </h1>
      <nav aria-label="Views">
        {(Object.keys(VIEWS) as View[]).map((name) => (
          <a href={`#${name}`} aria-current={view.value === name ? "page" : undefined}>
            {name}
          </a>
        ))}
      </nav>
      <p class="model" title={model.value?.kind}>
        {model.value?.id}
      </p>
      <Meters />
      <div class="tools">
        {!isWide.value && view.value === "chat" && toggle("conversations", "History")}
        {toggle("settings", "Settings")}
        <button type="button" class="quiet theme" aria-label={`Use the ${next} theme`} title={`Use the ${next} theme`} onClick={() => changeSettings({ theme: next })}>
          <svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">
            <circle cx="8" cy="8" r="6.25" fill="none" stroke="currentColor" stroke-width="1.5" />
            <path d="M8 2a6 6 0 0 1 0 12z" fill="currentColor" />
          </svg>
        </button>
      </div>
    </header>
  );
}

function Settings() {
  const chat = current.value;
  return (
    <>
      <h2>System prompt</h2>
      {chat && (
        <Growing
          id="system"
          label="System prompt of this conversation"
          value={chat.system}
          placeholder={model.value?.chat === false ? "This model has no chat template" : "None in this conversation"}
          onText={(system) => changeConversation(chat.id, () => ({ system }))}
        />
      )}
      {view.value !== "compare" && (
        <>
          <h2>Attention</h2>
          <PlanPicker plan={settings.value.plan} onChange={(plan) => changeSettings({ plan })} />
        </>
      )}
      <h2>Tokens</h2>
      <Sampling />
    </>
  );
}

function Panel({ name, label, children }: { name: "conversations" | "settings"; label: string; children: ComponentChildren }) {
  const box = useRef<HTMLElement>(null);
  useEffect(() => {
    if (over()) box.current!.querySelector<HTMLElement>("button, textarea")!.focus();
  }, []);
  return (
    <>
      {over() && <div class="veil" onClick={closePanel} />}
      <aside id={name} class={`panel ${name}`} aria-label={label} ref={box}>
        {over() && (
          <button type="button" class="quiet close" onClick={closePanel}>
            Close
          </button>
        )}
        {children}
      </aside>
    </>
  );
}

function KeyDialog() {
  const box = useRef<HTMLDialogElement>(null);
  useEffect(() => box.current!.showModal(), []);
  return (
    <dialog ref={box} aria-labelledby="key-title" onCancel={(event) => event.preventDefault()}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          giveKey(new FormData(event.currentTarget).get("key") as string);
        }}
      >
        <h2 id="key-title">This server wants a key</h2>
        {keyWanted.value?.tried && <p class="wrong">The key was refused.</p>}
        <label class="field">
          <span>API key</span>
          <input name="key" type="password" autocomplete="off" required autofocus />
        </label>
        <p class="muted">It is kept until this tab is closed.</p>
        <button type="submit" class="main">
          Use it
        </button>
      </form>
    </dialog>
  );
}

function onEscape(event: KeyboardEvent) {
  if (event.key !== "Escape" || event.defaultPrevented) return;
  if (over()) closePanel();
  else if (view.value === "compare") stopComparing();
  else stop();
}

export function App() {
  useEffect(() => {
    const go = () => (view.value = viewOf(location.hash));
    const measure = () => (isWide.value = wide.matches);
    window.addEventListener("hashchange", go);
    window.addEventListener("keydown", onEscape);
    wide.addEventListener("change", measure);
    return () => {
      window.removeEventListener("hashchange", go);
      window.removeEventListener("keydown", onEscape);
      wide.removeEventListener("change", measure);
    };
  }, []);
  const Shown = VIEWS[view.value];
  const chats = view.value === "chat" && (isWide.value || panel.value === "conversations");
  return (
    <>
      <Header />
      <div class="middle">
        {chats && (
          <Panel name="conversations" label="Conversations">
            <Conversations onPick={closePanel} />
          </Panel>
        )}
        <main id="view" tabIndex={-1} inert={over()}>
          <Shown />
        </main>
        {panel.value === "settings" && (
          <Panel name="settings" label="Settings">
            <Settings />
          </Panel>
        )}
      </div>
      {keyWanted.value && <KeyDialog />}
      <p class="unseen" role="status">
        {announcement.value}
      </p>
    </>
  );
}
