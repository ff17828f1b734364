// Keyboard shortcuts. Single letters work only outside of text fields, and can be switched off.

import { kept } from "./keep";
import * as store from "./store";

export const letters = kept("letters", true);

const focus = (id: string): void => document.getElementById(id)?.focus();
const toggle = (name: store.Panel): void => void (store.panel.value = store.panel.value === name ? null : name);

export const SHORTCUTS: { keys: string; what: string; run?: () => void }[] = [
  { keys: "Enter", what: "Send the message" },
  { keys: "Shift Enter", what: "New line" },
  { keys: "↑", what: "Edit the last message (in an empty field)" },
  { keys: "Esc", what: "Stop the answer; close what is open" },
  { keys: "/", what: "Go to the message field", run: () => focus("composer") },
  { keys: "n", what: "New chat", run: () => (store.close(), focus("composer")) },
  { keys: "f", what: "Find a chat", run: () => ((store.sidebar.value = true), setTimeout(focus, 50, "search")) },
  { keys: "r", what: "Answer again", run: () => void store.regenerate() },
  { keys: "s", what: "State view", run: () => toggle("state") },
  { keys: "b", what: "Branches", run: () => toggle("tree") },
  { keys: ",", what: "Settings", run: () => toggle("settings") },
  { keys: "j", what: "Next message", run: () => step(1) },
  { keys: "k", what: "Previous message", run: () => step(-1) },
  { keys: "?", what: "This list", run: () => void (store.help.value = true) },
];

function step(by: number): void {
  const all = [...document.querySelectorAll<HTMLElement>("[data-message]")];
  const at = all.indexOf(document.activeElement?.closest<HTMLElement>("[data-message]") as HTMLElement);
  const next = all[at < 0 ? (by > 0 ? 0 : all.length - 1) : at + by];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

export function keys(event: KeyboardEvent): void {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (document.querySelector("dialog[open], :popover-open")) return; // they close by themselves
  if (event.key === "Escape") {
    if (store.editing.value !== null) store.editing.value = null;
    else if (store.busy.value) store.stop();
    else if (store.sidebar.value) store.sidebar.value = false;
    else if (store.panel.value) store.panel.value = null;
    else return;
    event.preventDefault();
    return;
  }
  const target = event.target as HTMLElement;
  if (!letters.value || target.closest("input, textarea, select, [contenteditable]")) return;
  const shortcut = SHORTCUTS.find((each) => each.run && each.keys === event.key);
  if (!shortcut) return;
  event.preventDefault();
  shortcut.run!();
}
