// What the page remembers: conversations, settings, and what the server says of itself.
import { computed, effect, signal } from "@preact/signals";
import { get, messageOf, Refusal } from "./api";
import type { Model, Plan, Status, Timings, Value } from "./contract";

export interface Message {
  role: "user" | "assistant";
  content: string;
  plan?: Plan;
  timings?: Timings;
  /** Still being written. */
  live?: boolean;
  stopped?: boolean;
  /** As long as a reply may be, or the context is full. */
  cut?: boolean;
  error?: string;
}

export interface Conversation {
  id: string;
  title: string;
  system: string;
  messages: Message[];
  updated: number;
}

export type Theme = "light" | "dark";

interface Settings {
  plan: Plan;
  sampling: Record<string, Value>;
  theme: Theme | null;
}

const CHAT = "qkov.chat.";
const SETTINGS = "qkov.settings";
const CURRENT = "qkov.current";

/** Storage may be full, or forbidden; the page then works without a memory, and says so. */
export const storageFault = signal("");

function keep(name: string, text: string | null) {
  try {
    if (text === null) localStorage.removeItem(name);
    else localStorage.setItem(name, text);
    storageFault.value = "";
  } catch {
    storageFault.value = "This browser keeps no more: conversations are lost when the page is closed.";
  }
}

function recall<T>(name: string): T | null {
  try {
    return JSON.parse(localStorage.getItem(name) ?? "null");
  } catch {
    return null;
  }
}

function recallConversations(): Conversation[] {
  let names: string[] = [];
  try {
    names = Object.keys(localStorage).filter((name) => name.startsWith(CHAT));
  } catch {
    // No storage at all.
  }
  const found = names.map((name) => recall<Conversation>(name)).filter((chat) => chat !== null);
  // A reply that was being written when the page was closed is no longer.
  const settled = (message: Message) => (message.live ? { ...message, live: undefined, stopped: true } : message);
  return found
    .map((chat) => ({ ...chat, messages: chat.messages.map(settled) }))
    .sort((a, b) => b.updated - a.updated);
}

export const settings = signal<Settings>({ plan: {}, sampling: {}, theme: null, ...recall<Settings>(SETTINGS) });
export const conversations = signal<Conversation[]>(recallConversations());
export const currentId = signal<string>(recall<string>(CURRENT) ?? "");
export const current = computed(() => conversations.value.find((chat) => chat.id === currentId.value) ?? null);

export function createConversation() {
  const empty = conversations.value.find((chat) => chat.messages.length === 0);
  if (empty) {
    currentId.value = empty.id;
    return;
  }
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 6);
  const chat = { id, title: "", system: current.value?.system ?? "", messages: [], updated: Date.now() };
  conversations.value = [chat, ...conversations.value];
  currentId.value = id;
}

export function changeConversation(id: string, change: (chat: Conversation) => Partial<Conversation>) {
  conversations.value = conversations.value.map((chat) => (chat.id === id ? { ...chat, ...change(chat) } : chat));
}

export function deleteConversation(id: string) {
  conversations.value = conversations.value.filter((chat) => chat.id !== id);
  if (currentId.value === id) currentId.value = conversations.value[0]?.id ?? "";
  if (!current.value) createConversation();
}

export function changeSettings(change: Partial<Settings>) {
  settings.value = { ...settings.value, ...change };
}

/** Writes what has changed, at most twice a second, and when the page goes. */
export function startKeeping() {
  if (!current.value) createConversation();
  const kept = new Map(conversations.value.map((chat) => [chat.id, chat]));
  let timer = 0;
  const save = () => {
    window.clearTimeout(timer);
    timer = 0;
    const now = conversations.value;
    for (const chat of now) {
      if (kept.get(chat.id) === chat) continue;
      keep(CHAT + chat.id, JSON.stringify(chat));
      kept.set(chat.id, chat);
    }
    for (const id of [...kept.keys()]) {
      if (now.some((chat) => chat.id === id)) continue;
      keep(CHAT + id, null);
      kept.delete(id);
    }
    keep(SETTINGS, JSON.stringify(settings.value));
    keep(CURRENT, JSON.stringify(currentId.value));
  };
  effect(() => {
    void [conversations.value, settings.value, currentId.value];
    timer ||= window.setTimeout(save, 500);
  });
  window.addEventListener("pagehide", save);
}

export const model = signal<Model | null>(null);
export const modelFault = signal("");
export const status = signal<Status | null>(null);

async function loadModel(): Promise<boolean> {
  try {
    model.value = await get<Model>("/qkov/model");
    modelFault.value = "";
    return true;
  } catch (error) {
    modelFault.value = messageOf(error);
    return false;
  }
}

/** Asks once a second while somebody looks, and less often while the server is away. */
export async function watchStatus() {
  // A server that was away may come back with another model.
  let away = true;
  for (;;) {
    let pause = 1000;
    if (!document.hidden) {
      try {
        status.value = await get<Status>("/qkov/status");
        if (away) away = !(await loadModel());
      } catch (error) {
        status.value = null;
        away = true;
        if (error instanceof Refusal && error.status === 0) modelFault.value = error.message;
        pause = 5000;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

const systemTheme = signal<Theme>("light");
export const theme = computed<Theme>(() => settings.value.theme ?? systemTheme.value);

export function startTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const follow = () => (systemTheme.value = dark.matches ? "dark" : "light");
  follow();
  dark.addEventListener("change", follow);
  effect(() => {
    document.documentElement.dataset.theme = theme.value;
  });
}
