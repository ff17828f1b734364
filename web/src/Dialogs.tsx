import type { ComponentChildren, VNode } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { apiKey } from "./api";
import { Icon } from "./icons";
import { letters, SHORTCUTS } from "./keys";
import * as store from "./store";

function Dialog({ open, close, label, children }: { open: boolean; close: () => void; label: string; children: ComponentChildren }): VNode {
  const ref = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    if (open && !ref.current!.open) ref.current!.showModal();
    if (!open && ref.current!.open) ref.current!.close();
  }, [open]);
  return (
    <dialog ref={ref} aria-label={label} onClose={close} onClick={(event) => event.target === ref.current && close()}>
      {open && <div class="dialog">{children}</div>}
    </dialog>
  );
}

export function Help(): VNode {
  const close = (): void => void (store.help.value = false);
  return (
    <Dialog open={store.help.value} close={close} label="Keyboard shortcuts">
      <header>
        <h2>Keyboard</h2>
        <button type="button" class="icon-button" aria-label="Close" onClick={close}>
          <Icon name="close" />
        </button>
      </header>
      <dl class="shortcuts">
        {SHORTCUTS.map(({ keys, what }) => (
          <div key={keys}>
            <dt>
              {keys.split(" ").map((key) => (
                <kbd key={key}>{key}</kbd>
              ))}
            </dt>
            <dd>{what}</dd>
          </div>
        ))}
      </dl>
      <label class="check">
        <input type="checkbox" checked={letters.value} onChange={(event) => void (letters.value = event.currentTarget.checked)} />
        Single-key shortcuts (outside of text fields)
      </label>
    </Dialog>
  );
}

export function KeyDialog(): VNode {
  const [key, setKey] = useState("");
  const why = store.needsKey.value;
  const submit = (event: Event): void => {
    event.preventDefault();
    if (!key.trim()) return;
    apiKey.set(key.trim());
    setKey("");
    store.needsKey.value = "";
    void store.start();
  };
  return (
    <Dialog open={why !== ""} close={() => void (store.needsKey.value = "")} label="API key">
      <form onSubmit={submit}>
        <header>
          <h2>This server wants a key</h2>
        </header>
        <p id="key-why" class={why === "wrong" ? "problem" : "soft"} role={why === "wrong" ? "alert" : undefined}>
          {why === "wrong" ? "The server did not accept that key." : "Ask whoever runs it. The key stays in this tab and is gone when you close it."}
        </p>
        <label class="field">
          <span>API key</span>
          <input
            type="password"
            autocomplete="off"
            autofocus
            spellcheck={false}
            value={key}
            aria-describedby="key-why"
            onInput={(event) => setKey(event.currentTarget.value)}
          />
        </label>
        <div class="buttons">
          <button type="submit" class="primary" disabled={!key.trim()}>
            Continue
          </button>
        </div>
      </form>
    </Dialog>
  );
}

export function Toasts(): VNode {
  return (
    <div class="toasts" role="status" aria-live="polite">
      {store.toasts.value.map(({ id, text, kind, action }) => (
        <div key={id} class={`toast ${kind}`}>
          <span>{text}</span>
          {action && (
            <button type="button" class="link" onClick={action.run}>
              {action.label}
            </button>
          )}
          <button type="button" class="icon-button" aria-label="Dismiss" onClick={() => store.dismiss(id)}>
            <Icon name="close" />
          </button>
        </div>
      ))}
    </div>
  );
}
