import type { VNode } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { Turn } from "./api";
import { Copy } from "./code";
import { bytes, count, percent, plural, seconds, significant } from "./format";
import { Icon, Logo } from "./icons";
import { Markdown } from "./markdown";
import * as store from "./store";

export function Chat(): VNode {
  return (
    <>
      <Top />
      {!store.online.value && (
        <div class="banner" role="alert">
          <span class="pulse" />
          Connection lost. Nothing is gone: the chats live on the server, drafts in this browser. Reconnecting…
        </div>
      )}
      <Messages />
      <Composer />
    </>
  );
}

function Top(): VNode {
  const session = store.current.value;
  const toggle = (name: store.Panel): void => void (store.panel.value = store.panel.value === name ? null : name);
  return (
    <header class="top">
      <button type="button" class="icon-button only-narrow" aria-label="Show the chats" onClick={() => void (store.sidebar.value = true)}>
        <Icon name="menu" />
      </button>
      <h1>{session ? session.title || "Untitled" : "New chat"}</h1>
      {session && (
        <button
          type="button"
          class="gauge"
          title="The whole memory of this chat: of fixed size, however long it gets"
          aria-label={`State: ${bytes(session.bytes)} hold ${plural(session.tokens, "token")}. Open the state view`}
          onClick={() => toggle("state")}
        >
          <Icon name="state" />
          <span>
            <b>{count(session.tokens)}</b> tokens
          </span>
          <span class="wide">
            in <b>{bytes(session.bytes)}</b>
          </span>
        </button>
      )}
      {session && (
        <button type="button" class="icon-button wide" aria-label="Branches" aria-pressed={store.panel.value === "tree"} title="Branches (b)" onClick={() => toggle("tree")}>
          <Icon name="tree" />
        </button>
      )}
      <button type="button" class="icon-button" aria-label="Settings" aria-pressed={store.panel.value === "settings"} title="Settings (,)" onClick={() => toggle("settings")}>
        <Icon name="sliders" />
      </button>
    </header>
  );
}

function Messages(): VNode {
  const box = useRef<HTMLDivElement>(null);
  const stick = useRef(true);
  const width = useRef(0);
  const [away, setAway] = useState(false);
  const session = store.current.value;
  const live = store.currentLive.value;
  const turn = store.focusTurn.value;
  const down = (): void => box.current!.scrollTo({ top: box.current!.scrollHeight });
  const scrolled = (): void => {
    const { scrollHeight, scrollTop, clientHeight, clientWidth } = box.current!;
    if (clientWidth !== width.current && stick.current) return; // the browser moved, not the reader
    stick.current = scrollHeight - scrollTop - clientHeight < 60;
    setAway(!stick.current && scrollHeight - scrollTop - clientHeight > 300);
  };
  // a message that is sent is always followed; an answer only by those who are at its end
  useLayoutEffect(() => {
    stick.current = true;
  }, [session?.id, live?.user]);
  useLayoutEffect(() => {
    if (stick.current && turn === null) down();
  });
  // a panel that opens makes lines shorter and the chat longer
  useEffect(() => {
    const watch = new ResizeObserver(() => {
      width.current = box.current!.clientWidth;
      if (stick.current) down();
    });
    watch.observe(box.current!);
    watch.observe(box.current!.firstElementChild!);
    return () => watch.disconnect();
  }, []);
  useEffect(() => {
    if (turn === null) return;
    stick.current = false;
    document.getElementById(`turn-${turn}`)?.scrollIntoView({ block: "center" });
    document.getElementById(`turn-${turn}`)?.focus();
    store.focusTurn.value = null;
  }, [turn, session?.id]);

  const turns = session?.turns.slice(0, live ? live.after : undefined) ?? [];
  const empty = !session && !live;
  return (
    <div class="scroll" ref={box} onScroll={scrolled}>
      <div class="thread" role="log" aria-label="Conversation" aria-live="off" aria-busy={store.busy.value}>
        {store.opening.value !== null ? <p class="empty">Opening…</p> : empty ? <Welcome /> : null}
        {session?.system && <SystemPrompt text={session.system} />}
        {session?.parent && (
          <p class="origin">
            <Icon name="fork" />
            Forked after {plural(session.parent.turn, "turn")} of{" "}
            <button type="button" class="link" onClick={() => void store.open(session.parent!.id)}>
              {store.sessions.value.find((each) => each.id === session.parent!.id)?.title || "a deleted chat"}
            </button>
          </p>
        )}
        {store.opening.value === null && turns.map((each, i) => <Stored key={`${session!.id}/${each.index}/${each.created}`} turn={each} last={i === turns.length - 1 && !live} />)}
        {live && <Unstored live={live} />}
      </div>
      <div class="sr" role="status">
        {live?.status === "reading" ? "Reading your message" : live?.status === "writing" ? "Answering" : turns.length && !live ? "Answer complete" : ""}
      </div>
      {away && (
        <button type="button" class="jump" aria-label="To the newest message" onClick={down}>
          <Icon name="down" />
        </button>
      )}
    </div>
  );
}

const STARTERS = [
  "Once upon a time, there was a little fox who",
  "Tell me about the sea.",
  "Write a short list of things to take on a walk.",
];

function Welcome(): VNode {
  if (!store.ready.value) return <div class="welcome" />;
  return (
    <div class="welcome">
      <Logo />
      <h2>A chat whose memory has a fixed size</h2>
      <p>
        Everything said here lives in one recurrent state. It does not grow with the chat, so any turn can be saved, forked,
        rewound and resumed at once.
      </p>
      <div class="starters">
        {STARTERS.map((text) => (
          <button
            key={text}
            type="button"
            onClick={() => {
              store.drafts.value = { ...store.drafts.value, [store.NEW]: text };
              document.getElementById("composer")?.focus();
            }}
          >
            {text}
          </button>
        ))}
      </div>
    </div>
  );
}

function SystemPrompt({ text }: { text: string }): VNode {
  return (
    <details class="fold system">
      <summary>
        <Icon name="chevron" />
        System prompt
      </summary>
      <p>{text}</p>
    </details>
  );
}

function Reasoning({ text, open }: { text: string; open: boolean }): VNode {
  return (
    <details class="fold reasoning">
      <summary>
        <Icon name="chevron" />
        {open ? "Thinking" : "Thoughts"}
        {open && <span class="pulse" />}
      </summary>
      <Markdown text={text} />
    </details>
  );
}

function Stored({ turn, last }: { turn: Turn; last: boolean }): VNode {
  const session = store.current.value!;
  const speed = store.speeds.value[session.id]?.[turn.index];
  const report = store.reports.value[store.reportKey(session, turn.index + 1)];
  const busy = store.busy.value;
  const show = (): void => {
    store.shownTurn.value = turn.index + 1;
    store.panel.value = "state";
  };
  const moved = report?.changed ? ` · moved ${significant(report.changed.norm)}` : "";
  return (
    <section class="turn" id={`turn-${turn.index}`} tabIndex={-1} aria-label={`Turn ${turn.index + 1}`}>
      {store.editing.value === turn.index ? (
        <Editor turn={turn} />
      ) : (
        <article class="message user" data-message tabIndex={-1} aria-label="You">
          <div class="bubble">
            <Markdown text={turn.user} />
          </div>
          <div class="actions">
            <Action icon="edit" label="Edit" run={() => void (store.editing.value = turn.index)} disabled={busy} />
            <Copy text={turn.user} label="Copy message" />
          </div>
        </article>
      )}
      <article class="message answer" data-message tabIndex={-1} aria-label="Answer">
        {turn.reasoning && <Reasoning text={turn.reasoning} open={false} />}
        {turn.assistant ? <Markdown text={turn.assistant} /> : <p class="soft">(an empty answer)</p>}
        {turn.finish_reason === "length" && <p class="note">Cut off at the longest answer that is allowed.</p>}
        {["cancelled", "canceled", "abort", "stopped"].includes(turn.finish_reason) && <p class="note">Stopped here.</p>}
        <div class="below">
          <div class="actions">
            <Copy text={turn.assistant} label="Copy answer" />
            {last && <Action icon="again" label="Again" title="Answer again (r)" run={() => void store.regenerate()} disabled={busy} />}
            <Action icon="fork" label="Fork" title="A new chat that shares everything up to here" run={() => void store.fork(turn.index + 1)} disabled={busy} />
          </div>
          <button type="button" class="figures" title="How this turn moved the state" onClick={show}>
            {speed ? `${significant(speed.rate)} tok/s · first after ${seconds(speed.ttft)} · ` : ""}
            {plural(turn.completion_tokens, "token")}
            {speed && speed.cached > 0 ? ` · ${percent(speed.cached / Math.max(speed.read, 1))} reused` : ""}
            {moved}
          </button>
        </div>
      </article>
    </section>
  );
}

function Action({ icon, label, run, disabled, title }: { icon: "edit" | "again" | "fork"; label: string; run: () => void; disabled: boolean; title?: string }): VNode {
  return (
    <button type="button" class="quiet" onClick={run} disabled={disabled} title={title ?? label} aria-label={title && label === "Fork" ? "Fork here" : label}>
      <Icon name={icon} />
      <span class="word">{label}</span>
    </button>
  );
}

function Editor({ turn }: { turn: Turn }): VNode {
  const [text, setText] = useState(turn.user);
  const ref = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    ref.current!.focus();
    ref.current!.setSelectionRange(text.length, text.length);
  }, []);
  useLayoutEffect(() => grow(ref.current!), [text]);
  const later = store.current.value!.turns.length - turn.index - 1;
  const key = (event: KeyboardEvent): void => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) void store.replace(turn.index, text);
  };
  return (
    <div class="editor">
      <textarea ref={ref} aria-label="Edit the message" value={text} rows={2} onInput={(event) => setText(event.currentTarget.value)} onKeyDown={key} />
      <div class="buttons">
        <span class="soft">{later ? `Sending forgets ${plural(later, "later turn")}; a fork keeps ${later === 1 ? "it" : "them"}.` : ""}</span>
        <button type="button" onClick={() => void (store.editing.value = null)}>
          Cancel
        </button>
        <button type="button" disabled={!text.trim()} onClick={() => void store.fork(turn.index, text)}>
          Send in a fork
        </button>
        <button type="button" class="primary" disabled={!text.trim()} onClick={() => void store.replace(turn.index, text)}>
          Send
        </button>
      </div>
    </div>
  );
}

function Unstored({ live }: { live: store.Live }): VNode {
  const writing = live.status === "reading" || live.status === "writing";
  return (
    <section class="turn">
      <article class="message user" data-message tabIndex={-1} aria-label="You">
        <div class="bubble">
          <Markdown text={live.user} />
        </div>
      </article>
      <article class={`message answer ${live.status}`} data-message tabIndex={-1} aria-label="Answer">
        {live.reasoning && <Reasoning text={live.reasoning} open={writing && !live.answer} />}
        {live.answer && <Markdown text={live.answer} />}
        {live.status === "reading" && (
          <p class="dots" aria-hidden="true">
            <i />
            <i />
            <i />
          </p>
        )}
        {live.status === "writing" && live.speed && (
          <p class="figures">
            {live.speed.tokens > 2 ? `${significant(live.speed.rate)} tok/s · ` : ""}first after {seconds(live.speed.ttft)} · {plural(live.speed.tokens, "token")}
          </p>
        )}
        {live.status === "waiting" && <Waiting live={live} />}
        {live.status === "failed" && <Trouble text={live.problem || "Something went wrong."} alert />}
        {live.status === "stopped" && <Trouble text="Stopped. This turn is not part of the chat." />}
      </article>
    </section>
  );
}

function Trouble({ text, alert = false }: { text: string; alert?: boolean }): VNode {
  return (
    <div class={alert ? "trouble" : "trouble calm"} role={alert ? "alert" : undefined}>
      <span>{text}</span>
      <span class="buttons">
        <button type="button" onClick={store.takeBack}>
          Edit
        </button>
        <button type="button" class="primary" onClick={store.retry}>
          Try again
        </button>
      </span>
    </div>
  );
}

function Waiting({ live }: { live: store.Live }): VNode {
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now()), 250);
    return () => clearInterval(timer);
  }, []);
  const left = Math.max(0, Math.ceil((live.retryAt - now) / 1000));
  return (
    <div class="trouble calm" role="status">
      <span>
        The server is busy. Trying again in <b>{left} s</b>.
      </span>
      <span class="buttons">
        <button type="button" onClick={store.stop}>
          Cancel
        </button>
        <button type="button" class="primary" onClick={store.retry}>
          Now
        </button>
      </span>
    </div>
  );
}

function grow(area: HTMLTextAreaElement): void {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, innerHeight * 0.4)}px`;
}

const touch = matchMedia("(pointer: coarse)");

function Composer(): VNode {
  const ref = useRef<HTMLTextAreaElement>(null);
  const key = store.draftKey.value;
  const text = store.drafts.value[key] ?? "";
  const busy = store.busy.value;
  const set = (value: string): void => void (store.drafts.value = { ...store.drafts.value, [key]: value });
  useLayoutEffect(() => grow(ref.current!), [text, key]);
  useEffect(() => {
    if (!touch.matches) ref.current!.focus();
  }, [key]);
  const submit = (event?: Event): void => {
    event?.preventDefault();
    void store.send(text);
  };
  const press = (event: KeyboardEvent): void => {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey && (!touch.matches || event.ctrlKey || event.metaKey)) submit(event);
    const last = store.current.value?.turns.at(-1);
    if (event.key === "ArrowUp" && !text && last && !busy) {
      event.preventDefault();
      store.editing.value = last.index;
    }
  };
  const session = store.current.value;
  return (
    <form class="composer" onSubmit={submit}>
      <div class="box">
        <textarea
          id="composer"
          ref={ref}
          rows={1}
          aria-label="Message"
          placeholder={session ? "Go on…" : "Say something…"}
          value={text}
          onInput={(event) => set(event.currentTarget.value)}
          onKeyDown={press}
        />
        <div class="row">
          <ModelChoice />
          <span class="space" />
          <span class="hint">{busy ? "Esc stops" : "Enter sends"}</span>
          {busy ? (
            <button type="button" class="round stop" aria-label="Stop" title="Stop (Esc)" onClick={store.stop}>
              <Icon name="stop" />
            </button>
          ) : (
            <button type="submit" class="round" aria-label="Send" title="Send (Enter)" disabled={!text.trim() || !store.ready.value || store.opening.value !== null}>
              <Icon name="send" />
            </button>
          )}
        </div>
      </div>
    </form>
  );
}

/** A state belongs to its model: in a chat the model is told, for a new one it is chosen. */
function ModelChoice(): VNode {
  const session = store.current.value;
  const names = store.models.value;
  if (session || names.length < 2)
    return (
      <span class="model" title={session ? "A chat stays with its model: the state is the model’s own" : undefined}>
        {session?.model ?? names[0] ?? ""}
      </span>
    );
  return (
    <select class="model" aria-label="Model" value={store.model.value} onChange={(event) => void (store.model.value = event.currentTarget.value)}>
      {names.map((name) => (
        <option key={name} value={name}>
          {name}
        </option>
      ))}
    </select>
  );
}
