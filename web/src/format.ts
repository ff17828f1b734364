export const count = (n: number): string => Math.round(n).toLocaleString("en");

export function bytes(n: number): string {
  if (n < 1000) return `${n} B`;
  const units = ["kB", "MB", "GB", "TB"];
  let at = -1;
  while (n >= 999.5 && at < units.length - 1) {
    n /= 1000;
    at++;
  }
  return `${n < 10 ? n.toFixed(2) : n < 100 ? n.toFixed(1) : n.toFixed(0)} ${units[at]}`;
}

export const seconds = (ms: number): string => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`);
export const significant = (x: number): string =>
  x === 0 ? "0" : Math.abs(x) >= 1000 ? count(x) : Number(x.toPrecision(3)).toString();
export const percent = (x: number): string => `${x < 0.1 ? (x * 100).toFixed(1) : Math.round(x * 100)} %`;
export const plural = (n: number, word: string): string => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

/** `at` in seconds since 1970. */
export function ago(at: number, now = Date.now() / 1000): string {
  const s = Math.max(0, now - at);
  if (s < 60) return "now";
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h`;
  if (s < 7 * 86_400) return `${Math.floor(s / 86_400)} d`;
  return new Date(at * 1000).toLocaleDateString(undefined, { day: "numeric", month: "short" });
}
