// What the browser remembers: drafts, unanswered messages, settings, speeds. Everything else lives in the server's store.

import { effect, signal, type Signal } from "@preact/signals";

/** A signal whose value survives a reload. A full or forbidden store only loses the memory, not the page. */
export function kept<T>(name: string, initial: T): Signal<T> {
  const key = `receptance.${name}`;
  let value = initial;
  try {
    const text = localStorage.getItem(key);
    if (text !== null) value = JSON.parse(text) as T;
  } catch {}
  const result = signal(value);
  effect(() => {
    const text = JSON.stringify(result.value);
    try {
      localStorage.setItem(key, text);
    } catch {}
  });
  return result;
}

/** A copy of `record` without `key`. */
export function without<T>(record: Record<string, T>, key: string): Record<string, T> {
  const { [key]: _, ...rest } = record;
  return rest;
}
