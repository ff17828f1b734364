// Small charts over the layers of a model. One layer can be picked, with the pointer or the arrow keys, in all of them at once.

import type { ComponentChildren, VNode } from "preact";
import type { HalfLife } from "./api";
import { count, significant } from "./format";

const WIDTH = 340;
const LEFT = 34;
const RIGHT = 4;
const INNER = WIDTH - LEFT - RIGHT;

type Picking = { picked: number | null; pick: (layer: number | null) => void; label: string; readout: string };

function Frame({ n, height, picking, children }: { n: number; height: number; picking: Picking; children: ComponentChildren }): VNode {
  const { picked, pick, label, readout } = picking;
  const point = (event: PointerEvent): void => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const at = Math.floor(((((event.clientX - box.left) / box.width) * WIDTH - LEFT) / INNER) * n);
    pick(at >= 0 && at < n ? at : null);
  };
  const key = (event: KeyboardEvent): void => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    pick(picked === null ? (step > 0 ? 0 : n - 1) : Math.min(n - 1, Math.max(0, picked + step)));
  };
  return (
    <svg
      class="chart pickable"
      viewBox={`0 0 ${WIDTH} ${height}`}
      role="slider"
      tabindex={0}
      aria-label={label}
      aria-valuemin={0}
      aria-valuemax={n - 1}
      aria-valuenow={picked ?? 0}
      aria-valuetext={readout}
      onPointerMove={point}
      onPointerDown={point}
      onPointerLeave={() => pick(null)}
      onKeyDown={key}
    >
      {picked !== null && <rect class="picked" x={LEFT + (picked * INNER) / n} y="0" width={INNER / n} height={height - 14} rx="3" />}
      {children}
    </svg>
  );
}

/** Names under the columns, thinned out where they would touch. */
function Names({ names, y }: { names: string[]; y: number }): VNode {
  const every = Math.ceil(names.length / 16);
  return (
    <>
      {names.map((name, i) =>
        i % every ? null : (
          <text key={i} x={LEFT + ((i + 0.5) * INNER) / names.length} y={y} text-anchor="middle">
            {name}
          </text>
        ),
      )}
    </>
  );
}

/** The next number that halves well. */
function roundUp(x: number): number {
  const power = 10 ** Math.floor(Math.log10(x));
  return ([1, 1.6, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= x * 0.999) ?? 10) * power;
}

export function Bars({ values, front, names, ...picking }: { values: number[]; front: (number | null)[]; names: string[] } & Picking): VNode {
  const height = 132;
  const floor = height - 16;
  const top = roundUp(Math.max(...values, ...front.map((x) => x ?? 0), 1e-6));
  const scale = (x: number): number => ((floor - 6) * x) / top;
  const slot = INNER / values.length;
  const width = Math.min(slot * 0.72, 30);
  const round = Math.min(3, width / 3);
  return (
    <Frame n={values.length} height={height} picking={picking}>
      {[0, 0.5, 1].map((share) => (
        <g key={share}>
          <path class="grid" d={`M${LEFT} ${floor - scale(top * share)}H${WIDTH - RIGHT}`} />
          <text x={LEFT - 5} y={floor - scale(top * share) + 3.5} text-anchor="end">
            {significant(top * share)}
          </text>
        </g>
      ))}
      {values.map((value, i) => {
        const x = LEFT + slot * (i + 0.5) - width / 2;
        const moved = front[i];
        return (
          <g key={i}>
            <path class="fill-faint" d={column(x, floor, width, scale(value), round)} />
            {moved != null && <path class="fill-amber" d={column(x + width * 0.2, floor, width * 0.6, scale(moved), round * 0.8)} />}
          </g>
        );
      })}
      <Names names={names} y={height - 3} />
    </Frame>
  );
}

/** A column that is round at its top only. */
function column(x: number, floor: number, width: number, height: number, round: number): string {
  const r = Math.min(round, height);
  return `M${x} ${floor}v${-(height - r)}q0 ${-r} ${r} ${-r}h${width - 2 * r}q${r} 0 ${r} ${r}v${height - r}z`;
}

export function Ranges({ ranges, names, ...picking }: { ranges: (HalfLife | null)[]; names: string[] } & Picking): VNode {
  const height = 150;
  const floor = height - 16;
  const known = ranges.flatMap((range) => (range ? [range.p10, range.median, range.p90] : [])).filter((x): x is number => x !== null && x > 0);
  const low = Math.floor(Math.log10(Math.min(...known, 1)));
  const high = Math.min(Math.max(Math.ceil(Math.log10(Math.max(...known, 10))), low + 1), 7);
  const y = (x: number | null): number => {
    const log = x === null ? high : Math.log10(Math.max(x, 1e-9)); // null: it never fades
    return floor - ((floor - 8) * (Math.min(high, Math.max(low, log)) - low)) / (high - low);
  };
  const slot = INNER / ranges.length;
  const width = Math.min(slot * 0.5, 9);
  const powers = Array.from({ length: high - low + 1 }, (_, i) => low + i);
  return (
    <Frame n={ranges.length} height={height} picking={picking}>
      {powers.map((power) => (
        <g key={power}>
          <path class="grid" d={`M${LEFT} ${y(10 ** power)}H${WIDTH - RIGHT}`} />
          <text x={LEFT - 5} y={y(10 ** power) + 3.5} text-anchor="end">
            {power >= 6 ? `${10 ** (power - 6)} M` : power >= 3 ? `${count(10 ** (power - 3))} k` : significant(10 ** power)}
          </text>
        </g>
      ))}
      {ranges.map((range, i) => {
        if (!range) return null;
        const x = LEFT + slot * (i + 0.5);
        const [upper, lower] = [y(range.p90), y(range.p10)];
        return (
          <g key={i}>
            <rect class="range" x={x - width / 2} y={upper} width={width} height={Math.max(lower - upper, 2)} rx={width / 2} />
            <circle class="fill-accent" cx={x} cy={y(range.median)} r={Math.max(width / 2, 2.2)} />
          </g>
        );
      })}
      <Names names={names} y={height - 3} />
    </Frame>
  );
}
