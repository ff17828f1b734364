"""Drafts against none, at one text: on text that repeats itself (records, code), and on ordinary text.

    python bench/speculation.py [--model rwkv7-stories] [--tokens 256] [--dtype float32] [--out FILE]

The same texts are written with and without drafts, in turns. Both must have the same tokens, or nothing is reported;
but where weights meet several rows as integers (AVX-512, AMX, 8 and 4 bits), one draw of a few hundred is another by
rounding, and such a text is marked: it has as many tokens, of the same kind.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import receptance as rc
from receptance.engine.core import Core
from receptance.engine.engine import make_runner
from receptance.engine.params import SamplingParams
from receptance.engine.request import Request
from receptance.engine.scheduler import Limits
from receptance.engine.speculation import PromptLookup
from receptance.tokenizers import tokenizer

RECORD = '{"name": "Lily", "age": 7, "likes": ["cats", "dogs"], "city": "York"},\n'
CODE = "for i in range(10):\n    total = total + values[i]\n    print(total)\n"
TEXTS = {
    "records": (RECORD * 12, 0.0),
    "code": (CODE * 12, 0.0),
    "a refrain": ("And the old king said: no, no, no, it is not so, not so. " * 10, 0.0),
    "a story": ("Once upon a time there was a little girl who lived by the sea.", 1.0),
    "another story": ("The old man looked at the sky and thought about the war.", 0.8),
}
ROUNDS = 9


def write(core: Core, prompt: str, temperature: float, tokens: int) -> tuple[list[int], float]:
    """The text's ids, and the seconds after the prompt was read."""
    params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=1, ignore_eos=True)
    completion = core.submit(Request(prompt, params))[0].job.completion
    while not completion.tokens:
        core.step()
    start = time.perf_counter()
    while core.has_work:
        core.step()
    return completion.ids, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="rwkv7-stories")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16", "int8", "int4"])
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    arguments = parser.parse_args()
    model, words = rc.load(arguments.model, engine="native", dtype=arguments.dtype), tokenizer(arguments.model)
    report = {}
    for name, (prompt, temperature) in TEXTS.items():
        seconds: dict[bool, list[float]] = {False: [], True: []}
        same = True
        cores = {
            drafts: Core(
                model,
                words,
                make_runner(model, 4, words),
                Limits(4),
                cache_bytes=0,
                host_bytes=1 << 30,
                drafter=PromptLookup() if drafts else None,
            )
            for drafts in (False, True)
        }
        for _ in range(ROUNDS):
            ids = {}
            for drafts, core in cores.items():
                ids[drafts], taken = write(core, prompt, temperature, arguments.tokens)
                seconds[drafts].append(taken)
            if ids[False] != ids[True]:
                if model.is_invariant or temperature == 0:
                    raise SystemExit(f"{name}: other tokens with drafts; no speed is reported")
                same = False
        stats = cores[True].stats
        drafted, accepted = stats.drafted, stats.accepted
        ratio = statistics.median(a / b for a, b in zip(seconds[False], seconds[True]))
        speed = arguments.tokens / min(seconds[False])
        report[name] = {
            "ratio": ratio,
            "best_ratio": min(seconds[False]) / min(seconds[True]),
            "tokens_per_s": speed,
            "drafted": drafted,
            "accepted": accepted,
            "same": same,
        }
        print(
            f"{name:16}{speed:10,.0f} tok/s without{ratio:8.2f}x with; {accepted} of {drafted} guesses held"
            + ("" if same else "; a draw differed by rounding")
        )
    about = {"model": arguments.model, "dtype": model.dtype, "engine": model.engine_name, "threads": model.threads}
    line = json.dumps({"bench": "speculation", **about, "results": report})
    if arguments.out:
        arguments.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
