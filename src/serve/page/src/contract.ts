// What the server takes and gives.

/** The parts of attention that a request may exchange; a part left out is the model's own. */
export interface Plan {
  norm?: string;
  form?: string;
  mask?: string;
}

export type Part = keyof Plan;

export interface Parameter {
  name: string;
  default: unknown;
  about: string;
  /** Which values, in words. */
  allowed?: string;
}

export interface Entry {
  name: string;
  about: string;
  parameters: Parameter[];
}

export type Value = number | boolean | string | string[];

export interface Model {
  id: string;
  kind: string;
  n_params: number;
  n_ctx: number;
  n_vocab: number;
  n_layers: number;
  n_heads: number;
  n_slots: number;
  chat: boolean;
  plan: Plan;
  norms: Entry[];
  forms: Entry[];
  masks: Entry[];
  sampling: Record<string, Value | null>;
}

export interface Status {
  slots: ({ busy: boolean; n_tokens: number } & Plan)[];
  queued: number;
  n_ctx: number;
  cache_bytes: number;
  tokens_per_second: number;
}

export interface Timings {
  prompt_n: number;
  cached_n: number;
  prompt_ms: number;
  predicted_n: number;
  predicted_ms: number;
  predicted_per_second: number;
}

export interface Turn {
  role: "system" | "user" | "assistant";
  content: string;
}

/** What a model is asked: messages where it has a chat template, or else text to go on with. */
export type Prompt = { messages: Turn[] } | { prompt: string };

export interface Scored {
  id: number;
  text: string;
  kl: number;
  logprobs: [number, number];
  top: [Choice[], Choice[]];
}

export interface Choice {
  text: string;
  logprob: number;
}

export interface Comparison {
  tokens: Scored[];
  mean_kl: number;
  perplexity: [number, number];
}

export interface Attention {
  tokens: string[];
  n_prompt: number;
  n_layers: number;
  n_heads: number;
  layer: number;
  head: number;
  max: number;
  weights: string;
  entropy: number[];
  first: number[];
}
