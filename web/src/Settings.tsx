import type { VNode } from "preact";
import { useState } from "preact/hooks";
import { apiKey } from "./api";
import { Icon } from "./icons";
import { choose, CONTROLS, PRESETS, sampling, set, type Control, type Sampling } from "./settings";
import * as store from "./store";

export function Settings(): VNode {
  const session = store.current.value;
  const values = sampling.value;
  return (
    <div class="settings">
      <section>
        <h2>System prompt</h2>
        {session ? (
          <>
            <p class="soft">
              {session.system ? "This chat has read its system prompt; it is part of the state." : "This chat has none."} The one below is for new chats.
            </p>
          </>
        ) : (
          <p class="soft">Read once, at the start of each new chat.</p>
        )}
        <textarea
          aria-label="System prompt for new chats"
          rows={4}
          placeholder="None"
          value={store.system.value}
          onInput={(event) => void (store.system.value = event.currentTarget.value)}
        />
      </section>
      <section>
        <h2>Sampling</h2>
        <div class="presets" role="group" aria-label="Presets">
          {PRESETS.map((preset) => (
            <button key={preset.name} type="button" title={preset.hint} aria-pressed={isChosen(preset.values)} onClick={() => choose(preset.values)}>
              {preset.name}
            </button>
          ))}
        </div>
        {CONTROLS.map((control) => (
          <Slider key={control.key} control={control} />
        ))}
        <label class="field">
          <span>Seed</span>
          <input
            type="number"
            min={0}
            step={1}
            placeholder="Another one each time"
            value={values.seed ?? ""}
            onInput={(event) => set({ seed: event.currentTarget.value === "" ? null : Math.max(0, Math.floor(event.currentTarget.valueAsNumber)) })}
          />
        </label>
        <label class="field">
          <span>Stop at (one text a line, four at most)</span>
          <textarea rows={2} value={values.stop} onInput={(event) => set({ stop: event.currentTarget.value })} />
        </label>
      </section>
      <section>
        <h2>Server</h2>
        <Key />
      </section>
    </div>
  );
}

function isChosen(values: Partial<Sampling>): boolean {
  const { max_tokens: _m, seed: _s, stop: _t, ...sampler } = sampling.value;
  return Object.entries(sampler).every(([key, value]) => (values[key as Control["key"]] ?? null) === value);
}

function Slider({ control }: { control: Control }): VNode {
  const { key, label, hint, min, max, step, start } = control;
  const value = sampling.value[key];
  const id = `set-${key}`;
  const clamp = (x: number): number => Math.min(max, Math.max(min, x));
  return (
    <div class={`slider${value === null ? " unset" : ""}`}>
      <label for={id} title={hint}>
        {label}
      </label>
      <button type="button" class="icon-button" disabled={value === null} aria-label={`${label}: back to the model’s own`} title="Back to the model’s own" onClick={() => set({ [key]: null })}>
        <Icon name="close" />
      </button>
      <input
        type="number"
        aria-label={`${label}, as a number`}
        min={min}
        max={max}
        step={step}
        placeholder="auto"
        value={value ?? ""}
        onChange={(event) => set({ [key]: event.currentTarget.value === "" ? null : clamp(event.currentTarget.valueAsNumber) })}
      />
      <input id={id} type="range" min={min} max={max} step={step} value={value ?? start} title={hint} onInput={(event) => set({ [key]: event.currentTarget.valueAsNumber })} />
    </div>
  );
}

function Key(): VNode {
  const [key, setKey] = useState(apiKey.get());
  const save = (event: Event): void => {
    event.preventDefault();
    apiKey.set(key.trim());
    void store.start();
    store.toast(key.trim() ? "The key is kept in this tab." : "The key is forgotten.");
  };
  return (
    <form onSubmit={save}>
      <label class="field">
        <span>API key (kept in this tab only)</span>
        <input type="password" autocomplete="off" spellcheck={false} placeholder="None" value={key} onInput={(event) => setKey(event.currentTarget.value)} />
      </label>
      <div class="buttons">
        <button type="submit" disabled={key.trim() === apiKey.get()}>
          Use it
        </button>
      </div>
    </form>
  );
}
