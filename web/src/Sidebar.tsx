import { signal } from "@preact/signals";
import type { VNode } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import type { Summary } from "./api";
import { ago, bytes, count } from "./format";
import { Icon, Logo, type IconName } from "./icons";
import * as store from "./store";

const search = signal("");
const tag = signal("");
const field = signal<{ id: string; what: "title" | "tags" } | null>(null);

/** Forks under what they were forked from; the newest family first. */
export function inOrder(sessions: Summary[]): { session: Summary; depth: number }[] {
  const known = new Map(sessions.map((each) => [each.id, each]));
  const children = new Map<string, Summary[]>();
  const roots: Summary[] = [];
  for (const each of sessions) {
    const parent = each.parent && known.has(each.parent.id) ? each.parent.id : null;
    if (parent === null) roots.push(each);
    else children.set(parent, [...(children.get(parent) ?? []), each]);
  }
  const newest = (each: Summary): number => Math.max(each.updated, ...(children.get(each.id) ?? []).map(newest));
  const out: { session: Summary; depth: number }[] = [];
  const visit = (each: Summary, depth: number): void => {
    out.push({ session: each, depth });
    for (const child of children.get(each.id) ?? []) visit(child, depth + 1);
  };
  for (const root of roots.sort((a, b) => newest(b) - newest(a))) visit(root, 0);
  return out;
}

export function Sidebar(): VNode {
  const file = useRef<HTMLInputElement>(null);
  const all = store.sessions.value;
  const tags = [...new Set(all.flatMap((each) => each.tags))].sort();
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = tags.includes(tag.value) ? tag.value : "";
  const filtered = all.filter(
    (each) =>
      (!chosen || each.tags.includes(chosen)) &&
      words.every((word) => `${each.title} ${each.tags.join(" ")} ${each.model}`.toLowerCase().includes(word)),
  );
  const shown = words.length || chosen ? filtered.map((session) => ({ session, depth: 0 })) : inOrder(filtered);
  const many = store.models.value.length > 1;
  const pick = (event: Event & { currentTarget: HTMLInputElement }): void => {
    const chosenFile = event.currentTarget.files?.[0];
    if (chosenFile) void store.load(chosenFile);
    event.currentTarget.value = "";
  };
  return (
    <nav class="sidebar" aria-label="Chats">
      <header>
        <Logo />
        <span class="brand">receptance</span>
        <button type="button" class="icon-button only-narrow" aria-label="Close the list" onClick={() => void (store.sidebar.value = false)}>
          <Icon name="close" />
        </button>
      </header>
      <button type="button" class="new" onClick={() => (store.close(), document.getElementById("composer")?.focus())}>
        <Icon name="plus" />
        New chat
        <kbd>n</kbd>
      </button>
      {all.length > 0 && (
        <label class="search">
          <Icon name="search" />
          <input
            id="search"
            type="search"
            placeholder="Find a chat"
            aria-label="Find a chat"
            value={search.value}
            onInput={(event) => void (search.value = event.currentTarget.value)}
          />
        </label>
      )}
      {tags.length > 0 && (
        <div class="tags" role="group" aria-label="Filter by tag">
          {tags.map((each) => (
            <button key={each} type="button" class="tag" aria-pressed={each === chosen} onClick={() => void (tag.value = each === chosen ? "" : each)}>
              {each}
            </button>
          ))}
        </div>
      )}
      <ul class="sessions">
        {shown.map(({ session, depth }) => (
          <Row key={session.id} session={session} depth={depth} many={many} />
        ))}
      </ul>
      {store.ready.value && all.length === 0 && <p class="empty">Your chats will be listed here.</p>}
      {all.length > 0 && shown.length === 0 && <p class="empty">No chat matches.</p>}
      <footer>
        <button type="button" class="quiet" onClick={() => file.current?.click()}>
          <Icon name="upload" />
          Import
        </button>
        <input ref={file} type="file" class="hidden" aria-label="Import a chat from a file" tabIndex={-1} onChange={pick} />
        <span class="space" />
        <ThemeButton />
        <button type="button" class="icon-button" aria-label="Keyboard shortcuts" title="Keyboard shortcuts (?)" onClick={() => void (store.help.value = true)}>
          <Icon name="help" />
        </button>
      </footer>
    </nav>
  );
}

const THEMES = { "": ["auto", "as the system"], light: ["sun", "light"], dark: ["moon", "dark"] } as const;
function ThemeButton(): VNode {
  const order = ["", "light", "dark"] as const;
  const [icon, label] = THEMES[store.theme.value];
  const next = (): void => void (store.theme.value = order[(order.indexOf(store.theme.value) + 1) % 3]!);
  return (
    <button type="button" class="icon-button" aria-label={`Theme: ${label}. Change`} title={`Theme: ${label}`} onClick={next}>
      <Icon name={icon} />
    </button>
  );
}

function Row({ session, depth, many }: { session: Summary; depth: number; many: boolean }): VNode {
  const open = store.current.value?.id === session.id;
  const running = ["reading", "writing", "waiting"].includes(store.live.value[session.id]?.status ?? "");
  const editing = field.value?.id === session.id ? field.value.what : null;
  const title = session.title || "Untitled";
  return (
    <li class={`session${open ? " open" : ""}`} data-depth={Math.min(depth, 4)}>
      {editing ? (
        <Edit session={session} what={editing} />
      ) : (
        <>
          <button
            type="button"
            class="session-open"
            aria-current={open ? "page" : undefined}
            title={`${title}\n${count(session.tokens)} tokens in ${bytes(session.bytes)}`}
            onClick={() => void store.open(session.id)}
            onDblClick={() => void (field.value = { id: session.id, what: "title" })}
          >
            {depth > 0 && <Icon name="fork" />}
            <span class="session-title">{title}</span>
            {running ? <span class="pulse" role="img" aria-label="answering" /> : <span class="session-when">{ago(session.updated)}</span>}
            {(session.tags.length > 0 || many) && (
              <span class="session-more">
                {many && <span>{session.model}</span>}
                {session.tags.map((each) => (
                  <span class="tag" key={each}>
                    {each}
                  </span>
                ))}
              </span>
            )}
          </button>
          <Menu session={session} title={title} />
        </>
      )}
    </li>
  );
}

function Edit({ session, what }: { session: Summary; what: "title" | "tags" }): VNode {
  const ref = useRef<HTMLInputElement>(null);
  useEffect(() => ref.current?.select(), []);
  const done = (save: boolean): void => {
    if (field.value === null) return;
    field.value = null;
    const text = ref.current!.value.trim();
    if (!save) return;
    if (what === "title" && text && text !== session.title) void store.rename(session.id, text);
    if (what === "tags") {
      const tags = [...new Set(text.split(",").map((each) => each.trim()).filter(Boolean))];
      if (tags.join() !== session.tags.join()) void store.retag(session.id, tags);
    }
  };
  const key = (event: KeyboardEvent): void => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    done(event.key === "Enter");
  };
  return (
    <input
      ref={ref}
      class="session-edit"
      aria-label={what === "title" ? "Title" : "Tags, separated by commas"}
      placeholder={what === "title" ? "Title" : "Tags, separated by commas"}
      defaultValue={what === "title" ? session.title : session.tags.join(", ")}
      onKeyDown={key}
      onBlur={() => done(true)}
    />
  );
}

function Menu({ session, title }: { session: Summary; title: string }): VNode {
  const menu = useRef<HTMLDivElement>(null);
  const button = useRef<HTMLButtonElement>(null);
  const [open, setOpen] = useState(false);
  const choices: { label: string; icon: IconName; run: () => void; danger?: boolean }[] = [
    { label: "Rename", icon: "edit", run: () => void (field.value = { id: session.id, what: "title" }) },
    { label: "Tags", icon: "tag", run: () => void (field.value = { id: session.id, what: "tags" }) },
    { label: "Export", icon: "download", run: () => void store.save(session.id) },
    { label: "Delete", icon: "trash", run: () => store.remove(session.id), danger: true },
  ];
  const toggle = (event: Event): void => {
    const shown = (event as ToggleEvent).newState === "open";
    setOpen(shown);
    if (!shown) return;
    const place = button.current!.getBoundingClientRect();
    const box = menu.current!.getBoundingClientRect();
    const below = place.bottom + box.height + 8 < innerHeight;
    menu.current!.style.left = `${Math.max(8, Math.min(place.right - box.width, innerWidth - box.width - 8))}px`;
    menu.current!.style.top = `${below ? place.bottom + 4 : place.top - box.height - 4}px`;
    menu.current!.querySelector("button")?.focus();
  };
  const move = (event: KeyboardEvent): void => {
    const step = event.key === "ArrowDown" ? 1 : event.key === "ArrowUp" ? -1 : 0;
    if (!step) return;
    event.preventDefault();
    const items = [...menu.current!.querySelectorAll("button")];
    items[(items.indexOf(document.activeElement as HTMLButtonElement) + step + items.length) % items.length]!.focus();
  };
  return (
    <>
      <button
        ref={button}
        type="button"
        class="icon-button session-menu"
        aria-label={`More about “${title}”`}
        aria-haspopup="menu"
        aria-expanded={open}
        onClick={() => menu.current!.togglePopover()}
      >
        <Icon name="more" />
      </button>
      <div ref={menu} class="menu" role="menu" popover="auto" onToggle={toggle} onKeyDown={move}>
        {choices.map(({ label, icon, run, danger }) => (
          <button
            key={label}
            type="button"
            role="menuitem"
            class={danger ? "danger" : undefined}
            onClick={() => {
              menu.current!.hidePopover();
              run();
            }}
          >
            <Icon name={icon} />
            {label}
          </button>
        ))}
      </div>
    </>
  );
}
