// Sampling parameters. `null` means: not sent, so that the model's own preset decides.

import { kept } from "./keep";

export type Sampling = {
  temperature: number | null;
  top_p: number | null;
  top_k: number | null;
  min_p: number | null;
  presence_penalty: number | null;
  frequency_penalty: number | null;
  repetition_penalty: number | null;
  penalty_decay: number | null;
  max_tokens: number | null;
  seed: number | null;
  stop: string;
};

const NONE: Sampling = {
  temperature: null,
  top_p: null,
  top_k: null,
  min_p: null,
  presence_penalty: null,
  frequency_penalty: null,
  repetition_penalty: null,
  penalty_decay: null,
  max_tokens: null,
  seed: null,
  stop: "",
};

export type Control = {
  key: Exclude<keyof Sampling, "stop">;
  label: string;
  hint: string;
  min: number;
  max: number;
  step: number;
  start: number;
};

export const CONTROLS: Control[] = [
  { key: "temperature", label: "Temperature", hint: "0 always takes the likeliest token; higher is more surprising", min: 0, max: 2, step: 0.05, start: 1 },
  { key: "top_p", label: "Top-p", hint: "Keep the likeliest tokens that together reach this probability", min: 0.01, max: 1, step: 0.01, start: 0.3 },
  { key: "top_k", label: "Top-k", hint: "Keep this many tokens; 0 keeps all", min: 0, max: 200, step: 1, start: 0 },
  { key: "min_p", label: "Min-p", hint: "Drop tokens less likely than this share of the likeliest", min: 0, max: 1, step: 0.01, start: 0 },
  { key: "presence_penalty", label: "Presence penalty", hint: "Against tokens that were used at all", min: -2, max: 2, step: 0.05, start: 0.5 },
  { key: "frequency_penalty", label: "Frequency penalty", hint: "Against tokens, more for each use", min: -2, max: 2, step: 0.05, start: 0.5 },
  { key: "repetition_penalty", label: "Repetition penalty", hint: "Divides the score of used tokens; 1 is off", min: 0.5, max: 2, step: 0.01, start: 1 },
  { key: "penalty_decay", label: "Penalty decay", hint: "How much of a penalty is left one token later", min: 0.9, max: 1, step: 0.001, start: 0.996 },
  { key: "max_tokens", label: "Longest answer", hint: "Tokens", min: 1, max: 4096, step: 1, start: 1000 },
];

export const PRESETS: { name: string; hint: string; values: Partial<Sampling> }[] = [
  { name: "Model’s own", hint: "Send nothing; the model’s preset decides", values: {} },
  { name: "Exact", hint: "The likeliest token, always", values: { temperature: 0 } },
  { name: "Balanced", hint: "Temperature 1, top-p 0.5", values: { temperature: 1, top_p: 0.5 } },
  { name: "Free", hint: "Temperature 1.2, top-p 0.9", values: { temperature: 1.2, top_p: 0.9 } },
];

export const sampling = kept<Sampling>("sampling", NONE);

export const set = (values: Partial<Sampling>): void => {
  sampling.value = { ...sampling.value, ...values };
};
/** A preset replaces the sampler; length, seed and stop strings stay. */
export const choose = (values: Partial<Sampling>): void => {
  const { max_tokens, seed, stop } = sampling.value;
  sampling.value = { ...NONE, max_tokens, seed, stop, ...values };
};

export function body(): Record<string, unknown> {
  const { stop, ...numbers } = sampling.value;
  const out: Record<string, unknown> = {};
  for (const [key, value] of Object.entries(numbers)) if (value !== null && value !== undefined) out[key] = value;
  const stops = stop.split("\n").filter(Boolean).slice(0, 4);
  if (stops.length) out.stop = stops;
  return out;
}
