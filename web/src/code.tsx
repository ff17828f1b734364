// A block of code with a copy button, coloured by a scanner that knows what most languages share.

import type { ComponentChildren, VNode } from "preact";
import { useState } from "preact/hooks";
import { Icon } from "./icons";

const KEYWORDS = new Set(
  ("and as assert async await break case catch class const continue def default del do elif else enum export extends extern false " +
    "False final finally fn for from func function if impl import in interface is let match mod mut new nil None not null of or " +
    "package pass private protected pub public raise return self static struct super switch this throw trait true True try type " +
    "typeof union unsafe use using var void where while with yield SELECT FROM WHERE JOIN GROUP ORDER BY INSERT UPDATE echo then fi done esac").split(" "),
);
const HASH = /^(py|python|sh|bash|shell|zsh|yaml|yml|toml|ruby|rb|r|perl|make|makefile|dockerfile|console|)$/i;
const TOKEN =
  /(\/\/[^\n]*|\/\*[^*]*(?:\*(?!\/)[^*]*)*(?:\*\/)?)|(#[^\n]*)|("(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|`(?:[^`\\]|\\.)*`?)|(\b\d[\w.]*)|([A-Za-z_]\w*)/g;
const LONGEST = 20_000; // beyond this a listing stays black and white

function coloured(text: string, language: string): ComponentChildren {
  if (text.length > LONGEST || language === "text") return text;
  const out: ComponentChildren[] = [];
  let end = 0;
  for (const match of text.matchAll(TOKEN)) {
    const [whole, slashes, hash, string, number, word] = match;
    const kind = slashes
      ? "c"
      : hash
        ? HASH.test(language) && "c"
        : string
          ? "s"
          : number
            ? "n"
            : word && KEYWORDS.has(word) && "k";
    if (!kind) continue;
    out.push(text.slice(end, match.index), <i class={`t-${kind}`}>{whole}</i>);
    end = match.index + whole.length;
  }
  out.push(text.slice(end));
  return out;
}

export function Code({ language, text }: { language: string; text: string }): VNode {
  return (
    <figure class="code">
      <figcaption>
        <span>{language || "code"}</span>
        <Copy text={text} label="Copy code" />
      </figcaption>
      <pre tabIndex={0}>
        <code>{coloured(text, language)}</code>
      </pre>
    </figure>
  );
}

export function Copy({ text, label }: { text: string; label: string }): VNode {
  const [done, setDone] = useState(false);
  const copy = async (): Promise<void> => {
    await copyText(text);
    setDone(true);
    setTimeout(() => setDone(false), 1500);
  };
  return (
    <button type="button" class="quiet" onClick={copy} aria-label={done ? "Copied" : label} title={label}>
      <Icon name={done ? "check" : "copy"} />
      <span class="word">{done ? "Copied" : "Copy"}</span>
    </button>
  );
}

/** The clipboard needs a secure context; over plain http on another machine the old way still works. */
async function copyText(text: string): Promise<void> {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
