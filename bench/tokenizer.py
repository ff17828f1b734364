"""Speed of the World tokenizer on one core, beside the compiled pyrwkv-tokenizer and the reference trie of `rwkv`.

    python bench/tokenizer.py [FILE.txt | FILE.jsonl | either with .xz]... [--out FILE]

Every file is a row; without files, the source of Python's standard library. "cold" is a fresh tokenizer, "warm" one
that has read the same text once. The ids of all three must agree, or there is no report.
"""

import argparse
import importlib.util
import json
import lzma
import platform
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from receptance.tokenizers import tokenizer

REFERENCE_BYTES = 1_000_000  # the reference trie is slow: it reads this much of the text


def read(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".xz":
        data, path = lzma.decompress(data), path.with_suffix("")
    text = data.decode("utf-8")
    return "\n".join(json.loads(line)["text"] for line in text.split("\n") if line) if path.suffix == ".jsonl" else text


def standard_library() -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py")))


def timed(function: Callable[[str], list[int]], text: str) -> tuple[list[int], float]:
    """The ids, and megabytes of UTF-8 per second."""
    start = time.perf_counter()
    ids = function(text)
    return list(ids), len(text.encode("utf-8")) / (time.perf_counter() - start) / 1e6


def peers() -> dict[str, Callable[[str], list[int]]]:
    found: dict[str, Callable[[str], list[int]]] = {}
    if importlib.util.find_spec("pyrwkv_tokenizer"):
        from pyrwkv_tokenizer import RWKVTokenizer

        found["pyrwkv"] = RWKVTokenizer().encode
    if spec := importlib.util.find_spec("rwkv"):
        from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

        found["rwkv"] = TRIE_TOKENIZER(
            str(Path(spec.submodule_search_locations[0]) / "rwkv_vocab_v20230424.txt")
        ).encode
    return found


def measure(text: str, others: dict[str, Callable[[str], list[int]]]) -> dict[str, float]:
    start = time.perf_counter()
    world = tokenizer("world")
    row = {"megabytes": len(text.encode("utf-8")) / 1e6, "load_s": time.perf_counter() - start}
    ids, row["cold"] = timed(world.encode, text)
    _, row["warm"] = timed(world.encode, text)
    row["bytes_per_token"] = row["megabytes"] * 1e6 / max(len(ids), 1)
    if world.decode(ids) != text:
        sys.exit("decode(encode(text)) differs from the text; no report")
    for name, encode in others.items():
        part = text if name != "rwkv" else text[:REFERENCE_BYTES]
        expected, row[name] = timed(encode, part)
        if expected != (ids if part is text else world.encode(part)):
            sys.exit(f"the ids differ from those of {name}; no report")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    arguments = parser.parse_args()
    texts = {path.name: read(path) for path in arguments.files} or {"standard library": standard_library()}
    others = peers()
    rows = {name: measure(text, others) for name, text in texts.items()}
    columns = ["megabytes", "bytes_per_token", "load_s", "cold", "warm", *others]
    print("MB/s on one core; the ids of all tokenizers agree")
    print(f"{'text':32}" + "".join(f"{column:>16}" for column in columns))
    for name, row in rows.items():
        print(f"{name[:31]:32}" + "".join(f"{row[column]:16.2f}" for column in columns))
    line = json.dumps({"bench": "tokenizer", "python": platform.python_version(), "unit": "MB/s", "texts": rows})
    if arguments.out:
        arguments.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
