"""Speed of `receptance data prepare` in 1, 2, … processes, beside the tokenizer alone.

    python bench/prepare.py FILE.jsonl [--tokenizer world] [--processes 1 2] [--out RESULT.json]

The token files of all runs must be equal byte for byte, or there is no report. "once started" leaves out the first
piece and with it the start of the processes; "per CPU second" counts those of all processes, and holds on a busy
machine too.
The limit is the tokenizer itself, over texts that are already in memory.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from receptance.data import Progress, documents, prepare
from receptance.tokenizers import Tokenizer, tokenizer

Row = dict[str, float]


def alone(path: Path, tok: Tokenizer) -> float:
    """Megabytes of text per CPU second of `encode`."""
    texts = list(documents(path))
    start = time.process_time()
    for text in texts:
        tok.encode(text)
    return sum(len(text.encode()) for text in texts) / (time.process_time() - start) / 1e6


def measure(path: Path, tok: Tokenizer, prefix: Path, processes: int) -> Row:
    seen: list[tuple[float, Progress]] = []
    before, start = os.times(), time.perf_counter()
    prepare([path], tok, prefix, processes=processes, progress=lambda p: seen.append((time.perf_counter(), p)))
    seconds, after = time.perf_counter() - start, os.times()
    (begun, first), (ended, last) = next(entry for entry in seen if entry[1].read), seen[-1]
    return {
        "processes": processes,
        "MB/s": last.text_bytes / seconds / 1e6,
        "MB/s once started": (last.text_bytes - first.text_bytes) / (ended - begun) / 1e6,
        "MB per CPU second": last.text_bytes / (sum(after[:4]) - sum(before[:4])) / 1e6,
    }


def main() -> None:
    from measure import load, machine  # here: it imports torch, which the processes would do as well

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", default="world")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tok = tokenizer(args.tokenizer)
    limit = alone(args.file, tok)
    rows: list[Row] = []
    contents = set()
    with tempfile.TemporaryDirectory() as folder:
        for processes in args.processes:
            prefix = Path(folder) / str(processes)
            rows.append(measure(args.file, tok, prefix, processes))
            contents.add(prefix.with_suffix(".bin").read_bytes() + prefix.with_suffix(".idx").read_bytes())
    if len(contents) != 1:
        sys.exit("the token files differ: no report")
    print(f"{'processes':>10} {'MB/s':>8} {'once started':>14} {'per CPU second':>16}   tokenizer alone: {limit:.1f}")
    for row in rows:
        values = [row[name] for name in ("MB/s", "MB/s once started", "MB per CPU second")]
        print(f"{row['processes']:>10.0f} {values[0]:>8.2f} {values[1]:>14.2f} {values[2]:>16.2f}")
    result = {"bench": "prepare", "tokenizer": args.tokenizer, "bytes": args.file.stat().st_size, "rows": rows,
              "tokenizer alone, MB per CPU second": limit, "machine": machine("numpy"), "load": load()}  # fmt: skip
    line = json.dumps(result)
    print(line)
    if args.out:
        args.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
