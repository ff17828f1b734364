import { effect, signal } from "@preact/signals";
import type { VNode } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { Chat } from "./Chat";
import { Help, KeyDialog, Toasts } from "./Dialogs";
import { Icon } from "./icons";
import { keys } from "./keys";
import { Settings } from "./Settings";
import { Sidebar } from "./Sidebar";
import { StateView } from "./StateView";
import * as store from "./store";
import { Tree } from "./Tree";

/** Below this the panels lie over the chat instead of beside it. */
const narrow = signal(false);
const query = matchMedia("(max-width: 1099px)");
const follow = (): void => void (narrow.value = query.matches);
query.addEventListener("change", follow);
follow();

effect(() => {
  if (store.theme.value) document.documentElement.dataset.theme = store.theme.value;
  else delete document.documentElement.dataset.theme;
});
effect(() => {
  const title = store.current.value?.title;
  document.title = title ? `${title} · receptance` : "receptance";
});

const TABS: { id: store.Panel; label: string; icon: "state" | "tree" | "sliders" }[] = [
  { id: "state", label: "State", icon: "state" },
  { id: "tree", label: "Branches", icon: "tree" },
  { id: "settings", label: "Settings", icon: "sliders" },
];

export function App(): VNode {
  useEffect(() => {
    addEventListener("keydown", keys);
    return () => removeEventListener("keydown", keys);
  }, []);
  const panel = store.panel.value;
  const over = narrow.value && (panel !== null || store.sidebar.value);
  return (
    <>
      <a class="skip" href="#composer" onClick={(event) => { event.preventDefault(); document.getElementById("composer")?.focus(); }}>
        Skip to the message field
      </a>
      <div class={`frame${panel ? " with-panel" : ""}${store.sidebar.value ? " with-sidebar" : ""}`}>
        <Sidebar />
        <main inert={over}>
          <Chat />
        </main>
        {over && (
          <div
            class="scrim"
            onClick={() => {
              store.panel.value = null;
              store.sidebar.value = false;
            }}
          />
        )}
        {panel && <Side panel={panel} />}
      </div>
      <Help />
      <KeyDialog />
      <Toasts />
    </>
  );
}

function Side({ panel }: { panel: store.Panel }): VNode {
  const ref = useRef<HTMLElement>(null);
  useEffect(() => {
    if (narrow.value) ref.current?.querySelector<HTMLElement>("[role=tab][aria-selected=true]")?.focus();
  }, []);
  const move = (event: KeyboardEvent): void => {
    const step = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    if (!step) return;
    event.preventDefault();
    const next = TABS[(TABS.findIndex((tab) => tab.id === panel) + step + TABS.length) % TABS.length]!;
    store.panel.value = next.id;
    document.getElementById(`tab-${next.id}`)?.focus();
  };
  return (
    <aside class="panel" ref={ref} aria-label="Details">
      <header>
        <div role="tablist" aria-label="Details" onKeyDown={move}>
          {TABS.map((tab) => (
            <button
              key={tab.id}
              id={`tab-${tab.id}`}
              type="button"
              role="tab"
              aria-selected={tab.id === panel}
              aria-controls="panel-body"
              tabIndex={tab.id === panel ? 0 : -1}
              onClick={() => void (store.panel.value = tab.id)}
            >
              <Icon name={tab.icon} />
              {tab.label}
            </button>
          ))}
        </div>
        <button type="button" class="icon-button" aria-label="Close details" title="Close (Esc)" onClick={() => void (store.panel.value = null)}>
          <Icon name="close" />
        </button>
      </header>
      <div class="panel-body" id="panel-body" role="tabpanel" aria-labelledby={`tab-${panel}`} tabIndex={-1}>
        {panel === "state" ? <StateView /> : panel === "tree" ? <Tree /> : <Settings />}
      </div>
    </aside>
  );
}
