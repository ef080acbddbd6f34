// Replies of the current conversation: asked for, written into it piece by piece, stopped.
import { signal } from "@preact/signals";
import { messageOf, promptOf, reply } from "./api";
import type { Timings } from "./contract";
import { changeConversation, conversations, createConversation, current, model, settings, type Message } from "./store";

/** The reply that is being written, if any, and its tokens per second so far. */
export const running = signal<{ id: string; abort: AbortController } | null>(null);
export const liveSpeed = signal<number | null>(null);
/** Told to screen readers when a reply ends. */
export const announcement = signal("");

/** Tokens per second from the first token on, so that reading the prompt does not count. */
export class Speedometer {
  private first = 0;
  private n = 0;
  count() {
    if (this.n++ === 0) this.first = performance.now();
  }
  get speed(): number | null {
    const seconds = (performance.now() - this.first) / 1000;
    return this.n > 2 && seconds > 0.1 ? (this.n - 1) / seconds : null;
  }
}

/** Calls `show` with what was written last, once a frame at most. */
export function eachFrame(show: () => void): { ask: () => void; end: () => void } {
  let frame = 0;
  const run = () => {
    frame = 0;
    show();
  };
  return {
    ask: () => {
      frame ||= requestAnimationFrame(run);
    },
    end: () => {
      cancelAnimationFrame(frame);
      show();
    },
  };
}

export function send(text: string) {
  if (running.value || !text.trim()) return;
  if (!current.value) createConversation();
  const { id, messages, title } = current.value!;
  const turn: Message = { role: "user", content: text };
  const name = text.trim().split("\n")[0]!;
  changeConversation(id, () => ({
    title: title || (name.length > 48 ? `${name.slice(0, 47)}…` : name),
    messages: [...messages, turn],
  }));
  void write(id);
}

/** Writes the last reply of the current conversation anew. */
export function regenerate() {
  const chat = current.value;
  if (running.value || !chat) return;
  const last = chat.messages.findLastIndex((message) => message.role === "user");
  if (last < 0) return;
  changeConversation(chat.id, () => ({ messages: chat.messages.slice(0, last + 1) }));
  void write(chat.id);
}

/** Takes the conversation back to before a message, and returns its text. */
export function takeBack(index: number): string {
  const chat = current.value;
  const message = chat?.messages[index];
  if (running.value || !chat || !message) return "";
  changeConversation(chat.id, () => ({ messages: chat.messages.slice(0, index) }));
  return message.content;
}

export function stop() {
  running.value?.abort.abort();
}

async function write(id: string) {
  const chat = conversations.value.find((one) => one.id === id)!;
  const { plan, sampling } = settings.value;
  const abort = new AbortController();
  running.value = { id, abort };
  announcement.value = "";
  let [content, cut] = ["", false];
  let timings: Timings | undefined;
  const meter = new Speedometer();
  const put = (rest: Partial<Message>) =>
    changeConversation(id, () => ({
      messages: [...chat.messages, { role: "assistant", content, plan, ...rest }],
      updated: Date.now(),
    }));
  const frames = eachFrame(() => {
    put({ live: true });
    liveSpeed.value = meter.speed;
  });
  frames.ask();
  let error: string | undefined;
  try {
    const prompt = promptOf(model.value?.chat ?? true, chat.system, chat.messages);
    for await (const piece of reply(prompt, plan, sampling, abort.signal)) {
      if (piece.text) meter.count();
      content += piece.text;
      timings = piece.timings ?? timings;
      cut ||= piece.end === "length";
      frames.ask();
    }
  } catch (fault) {
    error = messageOf(fault);
  }
  frames.end();
  put({ timings, error, cut: cut || undefined, stopped: abort.signal.aborted || undefined });
  liveSpeed.value = null;
  running.value = null;
  announcement.value = error ?? (abort.signal.aborted ? "Stopped." : `Reply: ${content}`);
}
