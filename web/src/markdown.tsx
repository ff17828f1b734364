// Markdown to elements. The text of a model is never handed to the browser as HTML: every character goes through a text node,
// links may only go to http, https and mailto, and pictures become links, so that an answer cannot make the page call anybody.

import type { ComponentChildren, VNode } from "preact";
import { Component } from "preact";
import { Code } from "./code";

type Block =
  | { kind: "code"; language: string; text: string; open: boolean }
  | { kind: "heading"; level: number; text: string }
  | { kind: "rule" }
  | { kind: "quote"; lines: string[] }
  | { kind: "list"; ordered: boolean; start: number; items: string[][] }
  | { kind: "table"; align: string[]; head: string[]; rows: string[][] }
  | { kind: "paragraph"; text: string };

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +)(.*)$/;
const DIVIDER = /^ *\|?( *:?-+:? *\|)+( *:?-+:? *)?$|^ *\| *:?-+:? *\|? *$/;
const DEEPEST = 8; // quotes in lists in quotes: further down it is text

const cells = (line: string): string[] =>
  line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
const isBlank = (line: string | undefined): boolean => line !== undefined && line.trim() === "";
const startsBlock = (line: string): boolean =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || /^ {0,3}>/.test(line) || ITEM.test(line);

/** The blocks of some lines, each with its own source, by which an unchanged block is recognised while more text streams in. */
export function parse(lines: string[]): { block: Block; source: string }[] {
  const out: { block: Block; source: string }[] = [];
  let at = 0;
  while (at < lines.length) {
    const from = at;
    const block = next();
    if (block) out.push({ block, source: lines.slice(from, at).join("\n") });
  }
  return out;

  function next(): Block | null {
    const line = lines[at++]!;
    if (isBlank(line)) return null;
    const fence = FENCE.exec(line);
    if (fence) {
      const mark = fence[1]!;
      const body: string[] = [];
      while (at < lines.length) {
        const inner = lines[at++]!;
        const bare = inner.trim();
        if (bare.startsWith(mark) && bare === mark[0]!.repeat(bare.length))
          return { kind: "code", language: fence[2]!, text: body.join("\n"), open: false };
        body.push(inner);
      }
      return { kind: "code", language: fence[2]!, text: body.join("\n"), open: true };
    }
    const heading = HEADING.exec(line);
    if (heading) return { kind: "heading", level: heading[1]!.length, text: heading[2]!.replace(/\s+#+\s*$/, "") };
    if (RULE.test(line)) return { kind: "rule" };
    if (/^ {0,3}>/.test(line)) {
      const quoted = [line];
      while (at < lines.length && !isBlank(lines[at]) && (/^ {0,3}>/.test(lines[at]!) || !startsBlock(lines[at]!)))
        quoted.push(lines[at++]!);
      return { kind: "quote", lines: quoted.map((text) => text.replace(/^ {0,3}> ?/, "")) };
    }
    const item = ITEM.exec(line);
    if (item) return list(item);
    if (line.includes("|") && at < lines.length && DIVIDER.test(lines[at]!)) {
      const head = cells(line);
      const align = cells(lines[at++]!).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : "left"));
      const rows: string[][] = [];
      while (at < lines.length && lines[at]!.includes("|")) rows.push(cells(lines[at++]!).slice(0, head.length));
      return { kind: "table", align, head, rows };
    }
    const text = [line];
    while (at < lines.length && !isBlank(lines[at]) && !startsBlock(lines[at]!)) text.push(lines[at++]!);
    return { kind: "paragraph", text: text.join("\n").trim() };
  }

  function list(first: RegExpExecArray): Block {
    const ordered = /\d/.test(first[2]!);
    const items: string[][] = [];
    let match: RegExpExecArray | null = first;
    while (match) {
      const width = match[1]!.length + match[2]!.length + Math.min(match[3]!.length, 4);
      const own = [match[4]!];
      while (at < lines.length) {
        const line = lines[at]!;
        const indent = line.length - line.trimStart().length;
        if (isBlank(line)) {
          const after = lines[at + 1];
          if (after === undefined || isBlank(after) || after.length - after.trimStart().length < 2) break;
        } else if (indent < 2 && startsBlock(line)) break;
        else if (indent < 2 && isBlank(lines[at - 1])) break;
        own.push(line.slice(Math.min(indent, width)));
        at++;
      }
      items.push(own);
      let ahead = at;
      while (ahead < lines.length && isBlank(lines[ahead])) ahead++;
      match = ahead < lines.length && !RULE.test(lines[ahead]!) ? ITEM.exec(lines[ahead]!) : null;
      if (match && /\d/.test(match[2]!) !== ordered) match = null;
      if (match) at = ahead + 1;
    }
    return { kind: "list", ordered, start: Number.parseInt(first[2]!, 10) || 1, items };
  }
}

const PAIRS = ["**", "__", "~~", "*", "_"] as const;
const LETTER = /[\p{L}\p{N}]/u;

/** Emphasis, code, links and line breaks of one paragraph. */
export function inline(text: string, depth = 0): ComponentChildren[] {
  const out: ComponentChildren[] = [];
  const missing = new Set<string>(); // closing marks that do not come any more: keeps the work linear
  let plain = "";
  let at = 0;
  const flush = (): void => {
    if (plain) out.push(plain);
    plain = "";
  };
  const find = (mark: string, from: number): number => {
    if (missing.has(mark)) return -1;
    const found = text.indexOf(mark, from);
    if (found < 0) missing.add(mark);
    return found;
  };
  const special = (): VNode | null => {
    const c = text[at]!;
    if (c === "\n") return at++, (<br />);
    if (c === "`") {
      const mark = /^`+/.exec(text.slice(at, at + 8))![0];
      const end = find(mark, at + mark.length);
      if (end < 0) return null;
      const code = text.slice(at + mark.length, end).replace(/\n/g, " ");
      at = end + mark.length;
      return <code>{code.length > 2 && code.startsWith(" ") && code.endsWith(" ") ? code.slice(1, -1) : code}</code>;
    }
    if (c === "[" || (c === "!" && text[at + 1] === "[")) {
      const open = c === "!" ? at + 2 : at + 1;
      const middle = find("](", open);
      const close = middle < 0 ? -1 : find(")", middle);
      if (close < 0 || middle - open > 500 || close - middle > 2000) return null;
      const target = text.slice(middle + 2, close).trim().split(/\s/)[0]!;
      const label = text.slice(open, middle);
      at = close + 1;
      return link(target, depth < DEEPEST ? inline(label || target, depth + 1) : [label]);
    }
    if (c === "h" && !LETTER.test(text[at - 1] ?? "")) {
      const url = /^https?:\/\/[^\s<>"'`|\\]+/.exec(text.slice(at, at + 2000))?.[0].replace(/[.,;:!?)\]*_]+$/, "");
      if (!url || url.length < 10) return null;
      at += url.length;
      return link(url, [url]);
    }
    for (const mark of PAIRS) {
      if (!text.startsWith(mark, at) || depth >= DEEPEST) continue;
      const from = at + mark.length;
      if (/\s/.test(text[from] ?? " ")) continue;
      if (mark.startsWith("_") && LETTER.test(text[at - 1] ?? "")) continue;
      let end = find(mark, from + 1);
      // a single mark does not close at a double one
      while (mark.length === 1 && end >= 0 && text[end + 1] === mark) end = text.indexOf(mark, end + 2);
      if (end < 0 || /\s/.test(text[end - 1]!) || (mark.startsWith("_") && LETTER.test(text[end + mark.length] ?? ""))) continue;
      const inner = inline(text.slice(from, end), depth + 1);
      at = end + mark.length;
      return mark === "~~" ? <del>{inner}</del> : mark.length === 2 ? <strong>{inner}</strong> : <em>{inner}</em>;
    }
    return null;
  };
  while (at < text.length) {
    const c = text[at]!;
    if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1]!;
      at += 2;
      continue;
    }
    const element = "\n`[!h*_~".includes(c) ? special() : null;
    if (element) {
      flush();
      out.push(element);
    } else plain += text[at++]!;
  }
  flush();
  return out;
}

function link(target: string, label: ComponentChildren[]): VNode {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return <span>{label}</span>;
  return (
    <a href={target} target="_blank" rel="noopener noreferrer nofollow">
      {label}
    </a>
  );
}

function render(block: Block, depth: number): VNode {
  switch (block.kind) {
    case "code":
      return <Code language={block.language} text={block.text} />;
    case "heading": {
      // the page's own headings are h1 and h2
      const Tag = `h${Math.min(block.level + 2, 6)}` as "h3";
      return <Tag>{inline(block.text)}</Tag>;
    }
    case "rule":
      return <hr />;
    case "quote":
      return <blockquote>{blocks(block.lines, depth + 1)}</blockquote>;
    case "list": {
      const items = block.items.map((lines, i) => <li key={i}>{item(lines, depth + 1)}</li>);
      return block.ordered ? <ol start={block.start}>{items}</ol> : <ul>{items}</ul>;
    }
    case "table":
      return (
        <div class="scroll-x" tabIndex={0} role="region" aria-label="Table">
          <table>
            <thead>
              <tr>{block.head.map((cell, i) => <th key={i} class={block.align[i]}>{inline(cell)}</th>)}</tr>
            </thead>
            <tbody>
              {block.rows.map((row, r) => (
                <tr key={r}>{row.map((cell, i) => <td key={i} class={block.align[i]}>{inline(cell)}</td>)}</tr>
              ))}
            </tbody>
          </table>
        </div>
      );
    case "paragraph":
      return <p>{inline(block.text)}</p>;
  }
}

function blocks(lines: string[], depth: number): ComponentChildren {
  if (depth > DEEPEST) return lines.join("\n");
  return parse(lines).map(({ block }, i) => <div class="block" key={i}>{render(block, depth)}</div>);
}

/** A list item of one paragraph has no paragraph around it. */
function item(lines: string[], depth: number): ComponentChildren {
  if (depth > DEEPEST) return lines.join("\n");
  return parse(lines).map(({ block }, i) =>
    block.kind === "paragraph" ? <span key={i}>{inline(block.text)}</span> : <div key={i}>{render(block, depth)}</div>,
  );
}

/** One top-level block; drawn again only when its source has changed, so a long answer streams in constant time per token. */
class Piece extends Component<{ source: string; block: Block }> {
  override shouldComponentUpdate(next: { source: string }): boolean {
    return next.source !== this.props.source;
  }
  override render(): VNode {
    return <div class="block">{render(this.props.block, 0)}</div>;
  }
}

export function Markdown({ text }: { text: string }): VNode {
  return (
    <div class="prose">
      {parse(text.split(/\r?\n/)).map(({ block, source }, i) => (
        <Piece key={i} block={block} source={source} />
      ))}
    </div>
  );
}
