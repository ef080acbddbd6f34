// Requests to the server: JSON, event streams, and the API key where it wants one.
import { signal } from "@preact/signals";
import type { Plan, Prompt, Timings, Turn, Value } from "./contract";

const KEY = "qkov.key";

export class Refusal extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

/** Set while the server wants a key; `tried` says that one was refused. */
export const keyWanted = signal<{ tried: boolean } | null>(null);
let answered: Promise<void> | null = null;
let answer = () => {};

function key(): string {
  return sessionStorage.getItem(KEY) ?? "";
}

/** All requests that are refused meanwhile wait for the same answer. */
function askForKey(): Promise<void> {
  answered ??= new Promise((resolve) => {
    keyWanted.value = { tried: key() !== "" };
    answer = resolve;
  });
  return answered;
}

export function giveKey(text: string) {
  sessionStorage.setItem(KEY, text);
  keyWanted.value = null;
  answered = null;
  answer();
}

async function reasonOf(response: Response): Promise<string> {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return typeof error === "string" ? error : error.message;
  } catch {
    return text.trim() || `the server answered ${response.status} ${response.statusText}`;
  }
}

async function send(path: string, body?: unknown, abort?: AbortSignal): Promise<Response> {
  for (;;) {
    const used = key();
    const headers: Record<string, string> = {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (used) headers["Authorization"] = `Bearer ${used}`;
    let response;
    try {
      const json = body === undefined ? undefined : JSON.stringify(body);
      response = await fetch(path, { method: json ? "POST" : "GET", headers, body: json, signal: abort });
    } catch (error) {
      if (abort?.aborted) throw error;
      throw new Refusal("The server cannot be reached.", 0);
    }
    if (response.ok) return response;
    if (response.status !== 401) throw new Refusal(await reasonOf(response), response.status);
    // Another request may have been given a new key in the meantime.
    if (key() === used) await askForKey();
  }
}

export async function get<T>(path: string, abort?: AbortSignal): Promise<T> {
  return (await send(path, undefined, abort)).json();
}

export async function post<T>(path: string, body: unknown, abort?: AbortSignal): Promise<T> {
  return (await send(path, body, abort)).json();
}

interface Chunk {
  choices?: { delta?: { content?: string | null }; text?: string; finish_reason?: string | null }[];
  timings?: Timings;
  error?: { message: string };
}

async function* events(response: Response): AsyncGenerator<string> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop()!;
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export interface Piece {
  text: string;
  timings?: Timings;
  /** Why the model ended, in the last piece. */
  end?: string;
}

/** The reply to a prompt, as it is written. Ends early, without an error, where `abort` is raised. */
export async function* reply(
  prompt: Prompt,
  plan: Plan,
  sampling: Record<string, Value>,
  abort: AbortSignal,
): AsyncGenerator<Piece> {
  const path = "messages" in prompt ? "/v1/chat/completions" : "/v1/completions";
  try {
    const response = await send(path, { ...prompt, ...sampling, qkov: plan, stream: true }, abort);
    for await (const event of events(response)) {
      if (event === "[DONE]") return;
      const chunk: Chunk = JSON.parse(event);
      if (chunk.error) throw new Refusal(chunk.error.message, 500);
      const choice = chunk.choices?.[0];
      yield {
        text: choice?.delta?.content ?? choice?.text ?? "",
        timings: chunk.timings,
        end: choice?.finish_reason ?? undefined,
      };
    }
  } catch (error) {
    if (abort.aborted) return;
    // A connection that breaks in the middle of a stream is a plain TypeError.
    throw error instanceof TypeError ? new Refusal("The connection to the server broke.", 0) : error;
  }
}

/** Turns as the model is asked them. Without a chat template, their text is gone on with. */
export function promptOf(chat: boolean, system: string, turns: Turn[]): Prompt {
  if (!chat) return { prompt: turns.map((turn) => turn.content).join("\n") };
  const first: Turn[] = system.trim() ? [{ role: "system", content: system }] : [];
  return { messages: [...first, ...turns.map(({ role, content }) => ({ role, content }))] };
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
