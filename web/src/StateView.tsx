import type { VNode } from "preact";
import { useEffect, useState } from "preact/hooks";
import type { Session, StateReport } from "./api";
import { Bars, Ranges } from "./charts";
import { bytes, count, percent, plural, significant } from "./format";
import * as store from "./store";

export function StateView(): VNode {
  const session = store.current.value;
  const last = session?.turns.length ?? 0;
  const turn = Math.min(store.shownTurn.value, last);
  useEffect(() => {
    if (session && turn > 0) void store.loadReport(session, turn);
  }, [session, turn]);
  if (!session || last === 0)
    return <p class="empty">Say something first. Then this shows what the model keeps of it: what is stored, how fast it fades, how far each turn moved it.</p>;
  const report = store.reports.value[store.reportKey(session, turn)];
  return (
    <div class="state">
      <Headline session={session} report={report} />
      {last > 1 && (
        <div class="turn-choice">
          <label for="state-turn">
            After turn <b>{turn}</b> of {last}
          </label>
          <input id="state-turn" type="range" min={1} max={last} step={1} value={turn} onInput={(event) => void (store.shownTurn.value = event.currentTarget.valueAsNumber)} />
          <q>{session.turns[turn - 1]?.user.slice(0, 120)}</q>
        </div>
      )}
      {report ? <Report report={report} /> : <p class="empty">Reading the state…</p>}
    </div>
  );
}

/** Numbers that a Transformer of the same depth and width would keep for each token: a key and a value per layer. */
function cachePerToken(report: StateReport): number | null {
  const shift = report.fields.find((field) => field.name === "att_shift");
  const width = shift?.shape.at(-1);
  return width ? 2 * report.layers.length * width * 2 : null; // two bytes each
}

function Headline({ session, report }: { session: Session; report: StateReport | undefined }): VNode {
  const each = report && cachePerToken(report);
  const cache = each ? each * session.tokens : 0;
  return (
    <section class="headline">
      <p class="big">
        <b>{bytes(session.bytes)}</b> hold the whole chat
      </p>
      <p class="soft">
        {plural(session.tokens, "token")} so far. The next million would need no byte more.
        {each ? ` A Transformer as deep and wide would keep ${bytes(cache)} of keys and values here, and ${bytes(each)} more with each token.` : ""}
      </p>
      {each ? <Compare state={session.bytes} cache={cache} /> : null}
    </section>
  );
}

function Compare({ state, cache }: { state: number; cache: number }): VNode {
  const most = Math.max(state, cache);
  const row = (label: string, value: number, tone: string, y: number): VNode => (
    <g>
      <text x="0" y={y + 9}>{label}</text>
      <rect class="track" x="100" y={y} width="240" height="11" rx="3" />
      <rect class={tone} x="100" y={y} width={Math.max(3, (240 * value) / most)} height="11" rx="3" />
    </g>
  );
  return (
    <svg class="chart" viewBox="0 0 340 34" role="img" aria-label={`State ${bytes(state)}, keys and values ${bytes(cache)}`}>
      {row("This state", state, "fill-accent", 2)}
      {row("Key–value cache", cache, "fill-faint", 21)}
    </svg>
  );
}

function Report({ report }: { report: StateReport }): VNode {
  const [picked, pick] = useState<number | null>(null);
  const layers = report.layers;
  const chosen = picked === null ? null : layers[picked];
  const half = chosen?.half_life;
  const readout = chosen
    ? `Layer ${chosen.layer}: size ${significant(chosen.norm)}` +
      (chosen.change === null ? "" : `, moved ${significant(chosen.change)} (${percent(chosen.change / Math.max(chosen.norm, 1e-9))})`) +
      (half?.median != null ? `, half-life ${tokens(half.median)}` : "")
    : "Point at a layer, or move with the arrow keys.";
  return (
    <>
      {report.changed && (
        <section>
          <h2>This turn</h2>
          <div class="facts">
            <p>
              <b>{significant(report.changed.norm)}</b>
              <span>moved: norm of the difference</span>
            </p>
            <p>
              <b>{degrees(report.changed.cosine)}°</b>
              <span>turned: cosine {report.changed.cosine.toFixed(3)}</span>
            </p>
            <Dial cosine={report.changed.cosine} />
          </div>
        </section>
      )}
      <section>
        <h2>How far each layer moved</h2>
        <Bars
          values={layers.map((layer) => layer.norm)}
          front={layers.map((layer) => layer.change)}
          names={layers.map((layer) => String(layer.layer))}
          picked={picked}
          pick={pick}
          label="Size of each layer’s state, and how far this turn moved it"
          readout={readout}
        />
        <p class="legend">
          <i class="swatch faint" /> size of the state <i class="swatch amber" /> moved by this turn
        </p>
        <p class="readout" aria-live="off">
          {readout}
        </p>
      </section>
      {layers.some((layer) => layer.half_life?.median != null) && (
        <section>
          <h2>How long it remembers</h2>
          <p class="soft">Half-life of the channels of each layer, in tokens: the middle one, and where 80 % of them lie.</p>
          <Ranges ranges={layers.map((layer) => layer.half_life)} names={layers.map((layer) => String(layer.layer))} picked={picked} pick={pick} label="Half-lives of each layer" readout={readout} />
        </section>
      )}
      <section>
        <h2>What is stored</h2>
        <Stored report={report} />
      </section>
    </>
  );
}

const tokens = (n: number): string => (n >= 1e6 ? "over a million tokens" : `${significant(n)} token${n === 1 ? "" : "s"}`);

const angle = (cosine: number): number => Math.acos(Math.min(1, Math.max(-1, cosine)));
const degrees = (cosine: number): number => Math.round((angle(cosine) * 180) / Math.PI);

/** The angle between the state before and after, on a half circle. */
function Dial({ cosine }: { cosine: number }): VNode {
  const [x, y] = [40 + 34 * Math.cos(angle(cosine)), 40 - 34 * Math.sin(angle(cosine))];
  return (
    <svg class="dial" viewBox="0 0 80 46" role="img" aria-label={`Turned by ${degrees(cosine)} degrees`}>
      <path class="stroke-line" d="M6 40A34 34 0 0 1 74 40" />
      <path class="wedge" d={`M40 40L74 40A34 34 0 0 0 ${x} ${y}Z`} />
      <path class="stroke-faint" d="M40 40H74" />
      <path class="stroke-amber" d={`M40 40L${x} ${y}`} />
      <circle class="fill-amber" cx="40" cy="40" r="3" />
    </svg>
  );
}

function Stored({ report }: { report: StateReport }): VNode {
  const total = report.fields.reduce((sum, field) => sum + field.bytes, 0);
  let x = 0;
  return (
    <>
      <svg class="chart" viewBox="0 0 340 16" role="img" aria-label="Share of each field">
        {report.fields.map((field, i) => {
          const width = (340 * field.bytes) / total;
          const rect = <rect key={field.name} class={`part-${i % 5}`} x={x} y="1" width={Math.max(width - 1.5, 1)} height="14" rx="2.5" />;
          x += width;
          return rect;
        })}
      </svg>
      <table class="fields">
        <thead>
          <tr>
            <th>Field</th>
            <th>Shape</th>
            <th class="right">Bytes</th>
          </tr>
        </thead>
        <tbody>
          {report.fields.map((field, i) => (
            <tr key={field.name}>
              <td>
                <i class={`swatch part-${i % 5}`} />
                <code>{field.name}</code>
              </td>
              <td>{field.shape.join(" × ")}</td>
              <td class="right">{bytes(field.bytes)}</td>
            </tr>
          ))}
        </tbody>
        <tfoot>
          <tr>
            <td>Together</td>
            <td>{count(report.fields.reduce((sum, field) => sum + field.shape.reduce((a, b) => a * b, 1), 0))} numbers</td>
            <td class="right">{bytes(total)}</td>
          </tr>
        </tfoot>
      </table>
    </>
  );
}
