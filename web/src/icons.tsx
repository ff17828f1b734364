import type { VNode } from "preact";

// Strokes on a 20 × 20 grid.
const PATHS = {
  plus: "M10 4v12M4 10h12",
  send: "M10 16V4.5M5 9l5-5 5 5",
  stop: "M6 6h8v8H6z",
  copy: "M7.5 7.5h8v8h-8zM12.5 7.5v-3h-8v8h3",
  check: "M4.5 10.5l3.5 3.5 7.5-8",
  edit: "M4 16l.8-3.2L13.5 4l2.5 2.5-8.8 8.7zM11.8 5.8l2.4 2.4",
  again: "M15.5 8.5A6 6 0 1 0 16 11.5M15.8 4.5v4h-4",
  fork: "M6 7v6M6 7a1.8 1.8 0 1 0 0-3.5A1.8 1.8 0 0 0 6 7zm0 9.5A1.8 1.8 0 1 0 6 13a1.8 1.8 0 0 0 0 3.5zM14 7a1.8 1.8 0 1 0 0-3.5A1.8 1.8 0 0 0 14 7zm0 0c0 3.5-8 2.5-8 6",
  menu: "M3.5 6h13M3.5 10h13M3.5 14h13",
  close: "M5 5l10 10M15 5L5 15",
  state: "M3.5 4c.8 6.5 4 10.5 13 11.5M8 4.5c.8 3.2 3.2 5.2 8.5 6",
  sliders: "M4 6h7M15 6h1M4 14h1M9 14h7M13 4.2v3.6M7 12.2v3.6",
  tree: "M5 4v9a3 3 0 0 0 3 3h2M5 8h5M10 6h6v4h-6zM10 14h6v4h-6z",
  more: "M4.8 10h.4M9.8 10h.4M14.8 10h.4",
  trash: "M4.5 6h11M8 6V4h4v2M6 6l.7 10h6.6L14 6",
  download: "M10 3.5v9M6 9l4 4 4-4M4 16.5h12",
  upload: "M10 13V4M6 7.5l4-4 4 4M4 16.5h12",
  tag: "M3.5 4h6l7 7-5.5 5.5-7.5-7zM7 7.2h.01",
  sun: "M10 6.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7zM10 2v1.5M10 16.5V18M2 10h1.5M16.5 10H18M4.3 4.3l1.1 1.1M14.6 14.6l1.1 1.1M4.3 15.7l1.1-1.1M14.6 5.4l1.1-1.1",
  moon: "M16 11.5A6.5 6.5 0 0 1 8.5 4 6.5 6.5 0 1 0 16 11.5z",
  auto: "M10 3.5a6.5 6.5 0 1 0 0 13zM10 3.5a6.5 6.5 0 0 1 0 13",
  help: "M7.5 7.5a2.5 2.5 0 1 1 3.6 2.3c-.8.4-1.1.9-1.1 1.7M10 14.5h.01",
  key: "M12.5 4a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7zM10 10l-6 6M6 14l2 2",
  chevron: "M7.5 5l5 5-5 5",
  search: "M9 4a5 5 0 1 0 0 10A5 5 0 0 0 9 4zM12.8 12.8L16.5 16.5",
  down: "M10 4v11M5.5 10.5L10 15l4.5-4.5",
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name }: { name: IconName }): VNode {
  return (
    <svg class="icon" viewBox="0 0 20 20" aria-hidden="true" focusable="false">
      <path d={PATHS[name]} />
    </svg>
  );
}

export function Logo(): VNode {
  return (
    <svg class="logo" viewBox="0 0 32 32" aria-hidden="true" focusable="false">
      <rect width="32" height="32" rx="9" />
      <path d="M7 7.5c1.2 9.6 5.5 15.2 18 16.8" />
      <path class="faint" d="M12.5 9.5c1.5 4 4.6 7 12.3 8" />
      <circle cx="7.6" cy="7.8" r="2.6" />
    </svg>
  );
}
