// The page's state and everything that changes it. Components read signals and call these functions.

import { batch, computed, signal } from "@preact/signals";
import * as api from "./api";
import { kept, without } from "./keep";
import { body } from "./settings";

export type Speed = { ttft: number; rate: number; tokens: number; read: number; cached: number };

/** A turn that the server's store does not hold (yet). */
export type Live = {
  user: string;
  /** Turns that the session holds without this one. */
  after: number;
  answer: string;
  reasoning: string;
  status: "reading" | "writing" | "waiting" | "failed" | "stopped";
  speed: Speed | null;
  problem: string;
  /** When the next attempt starts, in ms since 1970. */
  retryAt: number;
};

export type Toast = { id: number; text: string; kind: "info" | "error"; action?: { label: string; run: () => void } };
export type Panel = "state" | "tree" | "settings";

export const models = signal<string[]>([]);
export const sessions = signal<api.Summary[]>([]);
export const current = signal<api.Session | null>(null);
/** The chat that the address names, until it is here. */
export const opening = signal<string | null>(named());
export const ready = signal(false);
export const online = signal(true);
export const needsKey = signal<"" | "missing" | "wrong">("");
export const live = signal<Record<string, Live>>({});
export const toasts = signal<Toast[]>([]);
export const panel = signal<Panel | null>(null);
export const sidebar = signal(false);
export const help = signal(false);
export const editing = signal<number | null>(null);
export const focusTurn = signal<number | null>(null);
/** The turn that the state view shows: the state after so many turns. */
export const shownTurn = signal(0);
export const reports = signal<Record<string, api.StateReport>>({});

export const model = kept("model", "");
export const system = kept("system", "");
export const drafts = kept<Record<string, string>>("drafts", {});
const pending = kept<Record<string, { user: string; after: number }>>("pending", {});
export const speeds = kept<Record<string, Record<number, Speed>>>("speeds", {});
export const theme = kept<"" | "light" | "dark">("theme", "");

export const NEW = "new"; // stands for the id of a chat that has none yet
export const draftKey = computed(() => opening.value ?? current.value?.id ?? NEW);
export const currentLive = computed(() => live.value[draftKey.value] ?? null);
export const busy = computed(() => ["reading", "writing", "waiting"].includes(currentLive.value?.status ?? ""));
const answering = (turn: Live): boolean => turn.status === "reading" || turn.status === "writing";

const aborts = new Map<string, AbortController>();
const timers = new Map<string, number>();

// ---- telling the user

let toastId = 0;
export function toast(text: string, kind: Toast["kind"] = "info", action?: Toast["action"], ms = 6000): number {
  const id = ++toastId;
  toasts.value = [...toasts.value.slice(-2), { id, text, kind, ...(action && { action }) }];
  if (ms) setTimeout(() => dismiss(id), ms);
  return id;
}
export const dismiss = (id: number): void => {
  toasts.value = toasts.value.filter((each) => each.id !== id);
};

/** Runs `action`; what goes wrong is shown, and `undefined` comes back. */
async function attempt<T>(action: () => Promise<T>): Promise<T | undefined> {
  try {
    const result = await action();
    online.value = true;
    return result;
  } catch (error) {
    report(error);
    return undefined;
  }
}

export function report(error: unknown): void {
  if (error instanceof api.ApiError && error.status === 401) needsKey.value = api.apiKey.get() ? "wrong" : "missing";
  else if (error instanceof api.ConnectionError) lost();
  else toast(explain(error), "error", undefined, 10000);
}

export function explain(error: unknown): string {
  if (error instanceof api.ApiError && error.status === 429)
    return error.retryAfter === null ? "The server is busy." : `The server is busy. Try again in ${wait(error.retryAfter)}.`;
  return error instanceof Error ? error.message : String(error);
}
const wait = (seconds: number): string => `${Math.ceil(seconds)} second${Math.ceil(seconds) === 1 ? "" : "s"}`;

let watching = false;
/** Asks for a sign of life until one comes, then reads everything again. */
async function lost(): Promise<void> {
  online.value = false;
  if (watching) return;
  watching = true;
  for (let pause = 1000; ; pause = Math.min(pause * 1.5, 10000)) {
    await new Promise((done) => setTimeout(done, pause));
    if (await api.alive()) break;
  }
  watching = false;
  online.value = true;
  await start();
}

// ---- reading

export async function start(): Promise<void> {
  const names = await attempt(api.models);
  if (!names) return;
  needsKey.value = "";
  models.value = names;
  if (!names.includes(model.value)) model.value = names[0] ?? "";
  await refreshList();
  ready.value = true;
  await follow();
}

async function refreshList(): Promise<void> {
  const list = await attempt(api.listSessions);
  if (list) sessions.value = list.filter((each) => !doomed.has(each.id)).sort((a, b) => b.updated - a.updated);
}

/** Shows what the address names. */
export async function follow(): Promise<void> {
  const id = named();
  if (!id) return close();
  if (current.value?.id !== id || opening.value) await open(id);
}

function named(): string | null {
  const id = /^#\/s\/(.+)$/.exec(location.hash)?.[1];
  return id ? decodeURIComponent(id) : null;
}

let asked = 0; // how often something was chosen to be shown: what comes later than another choice is not shown

export async function open(id: string, turn?: number): Promise<void> {
  const mine = ++asked;
  opening.value = current.value?.id === id ? null : id;
  const session = await attempt(() => api.getSession(id));
  if (mine !== asked) return;
  if (!session) {
    if (online.value && !needsKey.value) close();
    return;
  }
  adopt(session);
  focusTurn.value = turn ?? null;
  sidebar.value = false;
  recall(session);
}

export function close(): void {
  asked++;
  batch(() => {
    opening.value = null;
    current.value = null;
    editing.value = null;
    sidebar.value = false;
    if (panel.value === "tree" || panel.value === "state") panel.value = null;
  });
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
}

function adopt(session: api.Session): void {
  batch(() => {
    if (current.value?.id !== session.id) editing.value = null;
    opening.value = null;
    current.value = session;
    shownTurn.value = session.turns.length;
    note(session);
  });
  const hash = `#/s/${encodeURIComponent(session.id)}`;
  if (location.hash !== hash) history.pushState(null, "", hash);
  // speeds of turns that are no longer there
  const old = speeds.value[session.id];
  if (old && Object.keys(old).some((turn) => Number(turn) >= session.turns.length))
    speeds.value = {
      ...speeds.value,
      [session.id]: Object.fromEntries(Object.entries(old).filter(([turn]) => Number(turn) < session.turns.length)),
    };
}

function note(session: api.Summary): void {
  const { turns: _, ...summary } = session as api.Session;
  sessions.value = [summary, ...sessions.value.filter((each) => each.id !== session.id)].sort((a, b) => b.updated - a.updated);
}

/** A message that was sent before a reload and that the server did not answer is shown again. */
function recall(session: api.Session): void {
  const sent = pending.value[session.id];
  if (!sent || live.value[session.id]) return;
  if (session.turns.length > sent.after) pending.value = without(pending.value, session.id);
  else setLive(session.id, { ...fresh(sent.user, session.turns.length), status: "failed", problem: "This message was not answered." });
}

/** The state after `turns` turns of the shown chat; kept, for it does not change unless the chat is rewound. */
export async function loadReport(session: api.Session, turns: number): Promise<void> {
  const key = reportKey(session, turns);
  if (reports.value[key]) return;
  const found = await attempt(() => api.getState(session.id, turns));
  if (found) reports.value = { ...reports.value, [key]: found };
}
export const reportKey = (session: api.Session, turns: number): string =>
  `${session.id}/${turns}/${session.turns[turns - 1]?.created ?? 0}`;

// ---- a turn

const fresh = (user: string, after: number): Live => ({
  user,
  after,
  answer: "",
  reasoning: "",
  status: "reading",
  speed: null,
  problem: "",
  retryAt: 0,
});

const setLive = (id: string, turn: Live): void => {
  live.value = { ...live.value, [id]: turn };
};
export const dropLive = (id: string): void => {
  clearTimeout(timers.get(id));
  batch(() => {
    live.value = without(live.value, id);
    pending.value = without(pending.value, id);
  });
};

/** Sends a message in the shown chat, which is made first if there is none. */
export async function send(text: string): Promise<boolean> {
  if (busy.value || opening.value || !text.trim()) return false;
  let session = current.value;
  if (!session) {
    setLive(NEW, fresh(text, 0));
    const made = await attemptNew(text);
    live.value = without(live.value, NEW);
    if (!made) return false;
    session = made;
  }
  const id = session.id;
  batch(() => {
    drafts.value = without(without(drafts.value, id), NEW);
    setLive(id, fresh(text, session.turns.length));
    adopt(session);
  });
  void run(session.id, session.model);
  return true;
}

async function attemptNew(text: string): Promise<api.Session | undefined> {
  const fields = { model: model.value, title: titleOf(text), ...(system.value.trim() && { system: system.value.trim() }) };
  const made = await attempt(() => api.createSession(fields));
  return made && { ...made, turns: made.turns ?? [] };
}

export function titleOf(text: string): string {
  const line = text.trim().split("\n")[0]!.trim();
  return line.length > 60 ? `${line.slice(0, 57).replace(/\s+\S*$/, "")}…` : line;
}

/** Streams the live turn of a session until it is stored, stopped or failed. */
async function run(id: string, name: string): Promise<void> {
  const first = live.value[id];
  if (!first) return;
  const turn: Live = { ...fresh(first.user, first.after) };
  const abort = new AbortController();
  aborts.set(id, abort);
  pending.value = { ...pending.value, [id]: { user: turn.user, after: turn.after } };
  let frame = 0;
  const show = (): void => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      if (aborts.get(id) === abort) setLive(id, { ...turn });
    });
  };
  setLive(id, { ...turn });
  const started = performance.now();
  let [firstAt, lastAt, pieces] = [0, 0, 0];
  try {
    const request = { ...body(), model: name, session_id: id, messages: [{ role: "user", content: turn.user }] };
    for await (const { delta, usage } of api.chat(request, abort.signal)) {
      const text = delta.content ?? "";
      const thought = delta.reasoning_content ?? delta.reasoning ?? "";
      if (text || thought) {
        lastAt = performance.now();
        firstAt ||= lastAt;
        pieces++;
        turn.status = "writing";
        turn.answer += text;
        turn.reasoning += thought;
      }
      const tokens = usage?.completion_tokens ?? pieces;
      if (firstAt)
        turn.speed = {
          ttft: firstAt - started,
          rate: ((tokens - 1) * 1000) / Math.max(lastAt - firstAt, 1), // the first token's time is the prompt's
          tokens,
          read: usage?.prompt_tokens ?? 0,
          cached: usage?.prompt_tokens_details?.cached_tokens ?? 0,
        };
      show();
    }
    aborts.delete(id);
    await stored(id, turn);
  } catch (error) {
    aborts.delete(id);
    if (abort.signal.aborted) return await stopped(id, turn);
    failed(id, name, turn, error);
  } finally {
    cancelAnimationFrame(frame);
  }
}

async function stored(id: string, turn: Live): Promise<void> {
  const session = await attempt(() => api.getSession(id));
  if (!session || session.turns.length <= turn.after) {
    setLive(id, { ...turn, status: "failed", problem: "The answer arrived, but the server did not store the turn." });
    return;
  }
  finish(session, turn);
}

function finish(session: api.Session, turn: Live): void {
  batch(() => {
    if (turn.speed) {
      const recent = Object.entries(without(speeds.value, session.id)).slice(-49);
      const own = { ...speeds.value[session.id], [session.turns.length - 1]: turn.speed };
      speeds.value = Object.fromEntries([...recent, [session.id, own]]);
    }
    dropLive(session.id);
    if (current.value?.id === session.id) adopt(session);
    else note(session);
  });
  void loadReport(session, session.turns.length);
}

/** The server keeps a stopped turn or forgets it; ask which, giving it a moment to notice. */
async function stopped(id: string, turn: Live): Promise<void> {
  setLive(id, { ...turn, status: "stopped", problem: "" });
  for (const pause of [150, 400, 900]) {
    await new Promise((done) => setTimeout(done, pause));
    if (live.value[id]?.status !== "stopped") return; // retried meanwhile
    const session = await api.getSession(id).catch(() => null);
    if (session && session.turns.length > turn.after) return finish(session, turn);
  }
}

function failed(id: string, name: string, turn: Live, error: unknown): void {
  const busy = error instanceof api.ApiError && (error.status === 429 || error.status === 503);
  if (busy && error.retryAfter !== null && error.retryAfter <= 120) {
    const ms = Math.max(error.retryAfter, 0.5) * 1000;
    setLive(id, { ...turn, status: "waiting", problem: error.message, retryAt: Date.now() + ms });
    timers.set(id, window.setTimeout(() => live.value[id]?.status === "waiting" && void run(id, name), ms));
    return;
  }
  setLive(id, { ...turn, status: "failed", problem: explain(error) });
  if (!(error instanceof api.ApiError) || error.status === 401) report(error);
}

export function stop(): void {
  const session = current.value;
  const turn = currentLive.value;
  if (!session || !turn) return;
  clearTimeout(timers.get(session.id));
  if (turn.status === "waiting") setLive(session.id, { ...turn, status: "stopped" });
  aborts.get(session.id)?.abort();
}

export async function retry(): Promise<void> {
  const session = current.value;
  const turn = currentLive.value;
  if (!session || !turn || answering(turn)) return;
  clearTimeout(timers.get(session.id));
  setLive(session.id, fresh(turn.user, turn.after));
  // the server keeps a turn whose client was lost, as far as it came: it is replaced, not said twice
  const kept = await attempt(() => api.getSession(session.id));
  const extra = kept && kept.turns.length > turn.after;
  if (!kept || (extra && !(await attempt(() => api.rewindSession(session.id, turn.after)))))
    return setLive(session.id, { ...turn, status: "failed" });
  await run(session.id, session.model);
}

/** Takes an unanswered message back into the composer. */
export function takeBack(): void {
  const session = current.value;
  const turn = currentLive.value;
  if (!session || !turn) return;
  dropLive(session.id);
  drafts.value = { ...drafts.value, [session.id]: turn.user };
}

/** Forgets everything from turn `index` on and says `text` instead. */
export async function replace(index: number, text: string): Promise<void> {
  const session = current.value;
  if (!session || busy.value || !text.trim()) return;
  const id = session.id;
  // kept before the rewind: whatever happens now, the message is not lost
  pending.value = { ...pending.value, [id]: { user: text, after: index } };
  const done = await attempt(() => api.rewindSession(id, index));
  if (!done) {
    pending.value = without(pending.value, id);
    return;
  }
  batch(() => {
    editing.value = null;
    setLive(id, fresh(text, index));
    if (current.value?.id === id) adopt({ ...session, turns: session.turns.slice(0, index) });
  });
  await run(id, session.model);
}

export const regenerate = (): Promise<void> => {
  const last = current.value?.turns.at(-1);
  return last ? replace(last.index, last.user) : Promise.resolve();
};

/** A new chat that shares the first `turns` turns; with `text`, it goes on with that message. */
export async function fork(turns: number, text?: string): Promise<void> {
  const session = current.value;
  if (!session) return;
  const made = await attempt(() => api.forkSession(session.id, turns));
  if (!made) return;
  const title = text ? titleOf(text) : `${session.title || "Untitled"} ⑂`;
  await attempt(() => api.patchSession(made.id, { title }));
  await open(made.id);
  if (text) await send(text);
  else toast("Forked. The first turns are shared; from here on the two go their own ways.");
}

// ---- the list

export const rename = (id: string, title: string): Promise<void> => patch(id, { title });
export const retag = (id: string, tags: string[]): Promise<void> => patch(id, { tags });
async function patch(id: string, fields: { title?: string; tags?: string[] }): Promise<void> {
  const done = await attempt(() => api.patchSession(id, fields));
  if (!done) return;
  note({ ...sessions.value.find((each) => each.id === id)!, ...fields });
  if (current.value?.id === id) current.value = { ...current.value, ...fields };
}

const doomed = new Map<string, number>();
/** Deletes after a few seconds, in which it can be undone. */
export function remove(id: string): void {
  const title = sessions.value.find((each) => each.id === id)?.title || "Untitled";
  aborts.get(id)?.abort();
  const destroy = async (): Promise<void> => {
    doomed.delete(id);
    const done = await attempt(() => api.deleteSession(id));
    if (done === undefined) return void refreshList();
    batch(() => {
      dropLive(id);
      drafts.value = without(drafts.value, id);
      speeds.value = without(speeds.value, id);
    });
  };
  doomed.set(id, window.setTimeout(destroy, 6000));
  sessions.value = sessions.value.filter((each) => each.id !== id);
  if (current.value?.id === id) close();
  const undo = (): void => {
    clearTimeout(doomed.get(id));
    doomed.delete(id);
    dismiss(shown);
    void refreshList();
  };
  const shown = toast(`Deleted “${title}”.`, "info", { label: "Undo", run: undo });
}
/** The page is going away: what was to be deleted is deleted now. */
export function flushDeletes(): void {
  for (const [id, timer] of doomed) {
    clearTimeout(timer);
    api.deleteSession(id).catch(() => undefined);
  }
  doomed.clear();
}

export async function save(id: string): Promise<void> {
  const blob = await attempt(() => api.exportSession(id));
  if (!blob) return;
  const title = sessions.value.find((each) => each.id === id)?.title ?? "";
  const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || id;
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(blob);
  anchor.download = `${name}.session`;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 60_000);
}

export async function load(file: Blob): Promise<void> {
  const made = await attempt(() => api.importSession(file));
  if (!made) return;
  await open(made.id);
  toast("Imported.");
}
