// Everything the page says to the server. Paths are relative, so the page also works below a path prefix.

export type Turn = {
  index: number;
  user: string;
  assistant: string;
  reasoning?: string | null;
  prompt_tokens: number;
  completion_tokens: number;
  finish_reason: string;
  created: number;
};
export type Summary = {
  id: string;
  model: string;
  title: string;
  tags: string[];
  system: string | null;
  created: number;
  updated: number;
  parent: { id: string; turn: number } | null;
  tokens: number;
  bytes: number;
};
export type Session = Summary & { turns: Turn[] };
export type HalfLife = { median: number | null; p10: number | null; p90: number | null };
export type StateReport = {
  fields: { name: string; shape: number[]; bytes: number }[];
  layers: { layer: number; norm: number; change: number | null; half_life: HalfLife | null }[];
  changed: { norm: number; cosine: number } | null;
};
export type Usage = {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
};
export type Delta = { content?: string | null; reasoning_content?: string | null; reasoning?: string | null };

/** The server answered, and said no. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly retryAfter: number | null = null,
  ) {
    super(message);
  }
}

/** No answer came at all, or it broke off. */
export class ConnectionError extends Error {}

const KEY = "receptance.key";
export const apiKey = {
  get: (): string => sessionStorage.getItem(KEY) ?? "",
  set: (key: string): void => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

async function request(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  if (apiKey.get()) headers.set("Authorization", `Bearer ${apiKey.get()}`);
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ConnectionError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const after = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  throw new ApiError(response.status, await message(response), Number.isFinite(after) ? after : null);
}

async function message(response: Response): Promise<string> {
  const fallback = `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  try {
    const body = await response.json();
    return String(body?.error?.message ?? body?.detail ?? fallback);
  } catch {
    return fallback;
  }
}

async function json<T>(path: string, method = "GET", body?: unknown, keepalive = false): Promise<T> {
  const init: RequestInit = { method, keepalive }; // keepalive outlives the page
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers = { "Content-Type": "application/json" };
  }
  const response = await request(path, init);
  const text = await response.text();
  return (text ? JSON.parse(text) : null) as T;
}

const at = (id: string): string => `v1/sessions/${encodeURIComponent(id)}`;

export const models = async (): Promise<string[]> =>
  (await json<{ data: { id: string }[] }>("v1/models")).data.map((model) => model.id);
/** All of them, whatever the number that one answer holds. */
export const listSessions = async (): Promise<Summary[]> => {
  const found: Summary[] = [];
  for (let after = ""; ; ) {
    const page = await json<{ data: Summary[]; has_more?: boolean }>(`v1/sessions${after && `?after=${encodeURIComponent(after)}`}`);
    found.push(...page.data);
    if (!page.has_more || !page.data.length) return found;
    after = page.data[page.data.length - 1]!.id;
  }
};
export const createSession = (fields: { model: string; title: string; system?: string }): Promise<Session> =>
  json("v1/sessions", "POST", fields);
export const getSession = (id: string): Promise<Session> => json(at(id));
export const patchSession = (id: string, fields: { title?: string; tags?: string[] }): Promise<Summary> =>
  json(at(id), "PATCH", fields);
export const deleteSession = (id: string): Promise<unknown> => json(at(id), "DELETE", undefined, true);
/** `turns` is how many turns the copy keeps. */
export const forkSession = (id: string, turns: number): Promise<Summary> => json(`${at(id)}/fork`, "POST", { turn: turns });
/** `turns` is how many turns stay. */
export const rewindSession = (id: string, turns: number): Promise<Summary> => json(`${at(id)}/rewind`, "POST", { turn: turns });
/** The state after `turns` turns. */
export const getState = (id: string, turns: number): Promise<StateReport> => json(`${at(id)}/state?turn=${turns}`);
export const exportSession = async (id: string): Promise<Blob> => (await request(`${at(id)}/export`)).blob();
export const importSession = async (file: Blob): Promise<Summary> =>
  (
    await request("v1/sessions/import", {
      method: "POST",
      body: file,
      headers: { "Content-Type": "application/octet-stream" },
    })
  ).json();

/** True as soon as the server says it is alive; never throws. */
export async function alive(): Promise<boolean> {
  try {
    return (await fetch("health", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

export type Chunk = { delta: Delta; finish: string | null; usage: Usage | null };

/** One turn, streamed. Throws ApiError, ConnectionError, or the abort of `signal`. */
export async function* chat(body: Record<string, unknown>, signal: AbortSignal): AsyncGenerator<Chunk> {
  const response = await request("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    headers: { "Content-Type": "application/json" },
    signal,
  });
  for await (const data of events(response.body!, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.code ?? 500, String(chunk.error.message ?? "The server failed."));
    const choice = chunk.choices?.[0];
    yield { delta: choice?.delta ?? {}, finish: choice?.finish_reason ?? null, usage: chunk.usage ?? null };
  }
  throw new ConnectionError("The connection broke off in the middle of the answer.");
}

/** The data of each server-sent event. */
export async function* events(body: ReadableStream<Uint8Array>, signal: AbortSignal): AsyncGenerator<string> {
  const reader = body.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop()!;
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ConnectionError("The connection broke off in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => undefined);
  }
}
