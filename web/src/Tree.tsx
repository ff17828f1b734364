// The family of a chat as a graph: a lane for each branch, a dot for each turn, newest turns at the bottom.

import type { VNode } from "preact";
import { useEffect, useState } from "preact/hooks";
import * as api from "./api";
import { Icon } from "./icons";
import * as store from "./store";

/** The chat's relatives: everything that hangs on the same root. */
export function family(all: api.Summary[], id: string): api.Summary[] {
  const known = new Map(all.map((each) => [each.id, each]));
  const root = (each: api.Summary): string => {
    const seen = new Set<string>();
    while (each.parent && known.has(each.parent.id) && !seen.has(each.id)) {
      seen.add(each.id);
      each = known.get(each.parent.id)!;
    }
    return each.id;
  };
  const own = known.get(id);
  return own ? all.filter((each) => root(each) === root(own)) : [];
}

type Row = { session: api.Session; lane: number; turn: api.Turn | null; first: boolean; from: number | null; on: boolean };

/** Rows from top to bottom. `from` is the row that a branch grows out of, `on` says that chat `id` holds the turn; `turn` is null
 * for a branch without turns of its own. */
export function layout(sessions: api.Session[], id: string): { rows: Row[]; lanes: number } {
  const known = new Map(sessions.map((each) => [each.id, each]));
  const above = (each: api.Session): api.Session | undefined => (each.parent ? known.get(each.parent.id) : undefined);
  /** How many turns a branch still has in common with its parent, which may have been rewound since. */
  const shared = (each: api.Session): number => {
    const parent = above(each);
    const same = (turn: api.Turn, i: number): boolean => turn.user === parent!.turns[i]?.user && turn.assistant === parent!.turns[i]?.assistant;
    const most = parent ? Math.min(each.parent!.turn, each.turns.length, parent.turns.length) : 0;
    const differs = each.turns.slice(0, most).findIndex((turn, i) => !same(turn, i));
    return differs < 0 ? most : differs;
  };
  const lanes = new Map<string, number>();
  const place = (parent: api.Session | undefined): void => {
    const children = sessions.filter((each) => above(each) === parent);
    for (const child of children.sort((a, b) => a.created - b.created)) {
      lanes.set(child.id, lanes.size);
      place(child);
    }
  };
  place(undefined);
  const rows: Row[] = [];
  for (const session of sessions) {
    const lane = lanes.get(session.id) ?? 0;
    const own = session.turns.slice(shared(session));
    own.forEach((turn, i) => rows.push({ session, lane, turn, first: i === 0, from: null, on: false }));
    if (own.length === 0) rows.push({ session, lane, turn: null, first: true, from: null, on: session.id === id });
  }
  const time = (row: Row): number => row.turn?.created ?? row.session.created;
  rows.sort((a, b) => time(a) - time(b) || a.lane - b.lane || (a.turn?.index ?? 0) - (b.turn?.index ?? 0));
  /** The row of a session's turn: its own, or that of the ancestor who had it first. */
  const rowOf = (session: api.Session, index: number): Row | undefined => {
    while (index < shared(session)) session = above(session)!;
    return rows.find((row) => row.session === session && row.turn?.index === index);
  };
  for (const row of rows) {
    const start = row.first ? shared(row.session) : 0;
    const origin = start > 0 ? rowOf(row.session, start - 1) : undefined;
    row.from = origin ? rows.indexOf(origin) : null;
  }
  known.get(id)?.turns.forEach((turn) => {
    const row = rowOf(known.get(id)!, turn.index);
    if (row) row.on = true;
  });
  return { rows, lanes: lanes.size };
}

const STEP = 52;
const GAP = 18;
const MOST = 60; // relatives read at once

export function Tree(): VNode {
  const session = store.current.value;
  const [members, setMembers] = useState<api.Session[]>([]);
  const relatives = session ? family(store.sessions.value, session.id) : [];
  const version = relatives.map((each) => `${each.id}:${each.updated}:${each.title}`).join();
  useEffect(() => {
    let current = true;
    void Promise.allSettled(relatives.slice(0, MOST).map((each) => api.getSession(each.id))).then((all) => {
      if (current) setMembers(all.flatMap((each) => (each.status === "fulfilled" ? [each.value] : [])));
    });
    return () => void (current = false);
  }, [version]);
  if (!session) return <p class="empty">Open a chat to see its branches.</p>;
  const { rows, lanes } = layout(members, session.id);
  if (rows.every((row) => !row.turn)) return <p class="empty">{members.length ? "No turns yet." : "Reading the branches…"}</p>;
  const x = (lane: number): number => 14 + lane * GAP;
  const y = (row: number): number => 26 + row * STEP;
  const width = x(Math.max(lanes - 1, 0)) + 14;
  return (
    <div class="tree">
      <p class="soft">
        {members.length === 1
          ? "One branch so far. Fork at any turn: the copy costs nothing and both go on."
          : `${members.length} branches. Choose a turn to go there.`}
      </p>
      <div class="graph">
        <svg width={width} height={rows.length * STEP + 8} aria-hidden="true" focusable="false">
          {rows.map((row, i) => {
            const before = rows.slice(0, i).findLastIndex((each: Row) => each.session.id === row.session.id);
            const from = before >= 0 ? before : row.from;
            if (from === null) return null;
            const [x0, x1] = [x(rows[from]!.lane), x(row.lane)];
            const bend = Math.min(y(from) + STEP * 0.8, y(i));
            const d = x0 === x1 ? `M${x0} ${y(from)}V${y(i)}` : `M${x0} ${y(from)}C${x0} ${y(from) + 26} ${x1} ${y(from) + 14} ${x1} ${bend}V${y(i)}`;
            return <path key={`l${row.session.id}${i}`} class={`lane-${row.lane % 6}${row.session.id === session.id ? " strong" : ""}`} d={d} />;
          })}
          {rows.map((row, i) => (
            <circle key={`c${row.session.id}${i}`} class={`dot lane-${row.lane % 6}${row.turn ? "" : " hollow"}${row.on ? " on" : ""}`} cx={x(row.lane)} cy={y(i)} r={row.on ? 6 : 5} />
          ))}
        </svg>
        <ol>
          {rows.map((row) => (
            <li key={`${row.session.id}/${row.turn?.index ?? "none"}`} class={row.on ? "on" : ""}>
              <button
                type="button"
                aria-current={row.session.id === session.id && row.turn?.index === session.turns.length - 1 ? "true" : undefined}
                onClick={() => void store.open(row.session.id, row.turn?.index)}
              >
                {row.first && (
                  <span class={`branch lane-${row.lane % 6}`}>
                    {row.from !== null && <Icon name="fork" />}
                    {row.session.title || "Untitled"}
                  </span>
                )}
                <span class="said">{row.turn ? row.turn.user : "nothing said here yet"}</span>
              </button>
            </li>
          ))}
        </ol>
      </div>
    </div>
  );
}
