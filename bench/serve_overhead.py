"""What HTTP costs: texts written in a second by the bare engine and through the server, and a returning session's wait.

    python bench/serve_overhead.py [MODEL] [--batch 32] [--tokens 128] [--rounds 5] [--out FILE]

Pairs of runs (engine, server, engine, …) on one engine, medians; the client is another process on the same cores.
First the texts of both are compared. Ends in one JSON line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

import receptance as rc
from receptance.cli.model_source import find_model
from receptance.cli.serve_load import load
from receptance.server.app import Application
from receptance.server.config import ServedConfig, read_config
from receptance.server.protocol import protocol
from receptance.server.run import set_up_python

CLIENT = """  # reads as much as it can at a time, so that most of what is measured is the server's
import json, selectors, socket, sys
port, batch, tokens, stream = map(int, sys.argv[1:])
def ask(seed):
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": tokens, "seed": seed, "ignore_eos": True,
                       "temperature": 1, "stream": bool(stream)}).encode()
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(b"POST /v1/completions HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n"
                 b"Content-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
    sock.setblocking(False)
    return sock
while sys.stdin.readline():
    waiting, answers = selectors.DefaultSelector(), []
    for seed in range(batch):
        answers.append([])
        waiting.register(ask(seed), selectors.EVENT_READ, answers[-1])
    while waiting.get_map():
        for key, _ in waiting.select():
            data = key.fileobj.recv(1 << 16)
            key.data.append(data)
            if not data:
                waiting.unregister(key.fileobj)
                key.fileobj.close()
    found = [b"".join(parts) for parts in answers]
    whole = sum(b"[DONE]" in x if stream else b'"finish_reason":"length"' in x for x in found)
    print(whole, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--long", type=int, default=10_000, help="tokens of the session that returns")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    arguments = parser.parse_args()
    served = load("m", find_model(arguments.model), ServedConfig(threads=arguments.threads, slots=arguments.batch))
    config = read_config(None, [f"sessions.folder={tempfile.mkdtemp()}"])
    set_up_python()
    app = Application(config, [served])
    http = protocol(config.limits.header_seconds)
    server = uvicorn.Server(uvicorn.Config(app, http=http, port=0, log_config=None, access_log=False))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    params = replace(served.completion_sampling, max_tokens=arguments.tokens, ignore_eos=True)
    prompt = [served.tokenizer.eos_id, *served.tokenizer.encode("Once upon a time")]

    def engine() -> float:
        asked = [rc.Request(prompt, replace(params, seed=i)) for i in range(arguments.batch)]
        began = time.perf_counter()
        served.engine.generate(asked)
        return arguments.batch * arguments.tokens / (time.perf_counter() - began)

    def through_http(client: "subprocess.Popen[str]") -> float:
        began = time.perf_counter()
        client.stdin.write("go\n")  # type: ignore[union-attr]
        client.stdin.flush()  # type: ignore[union-attr]
        whole = int(client.stdout.readline())  # type: ignore[union-attr]
        assert whole == arguments.batch, f"{whole} of {arguments.batch} texts were whole"
        return arguments.batch * arguments.tokens / (time.perf_counter() - began)

    def post(path: str, **body: Any) -> tuple[Any, float]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}, method="POST"
        )
        began = time.perf_counter()
        with urllib.request.urlopen(request) as answer:
            return json.load(answer), time.perf_counter() - began

    told, _ = post("/v1/completions", prompt="Once upon a time", max_tokens=20, seed=1)
    alone = served.engine.generate(rc.Request(prompt, replace(served.completion_sampling, max_tokens=20, seed=1)))[0]
    assert told["choices"][0]["text"] == alone.text, "the server's text is not the engine's"

    clients = {}
    for name, stream in (("streams", "1"), ("whole", "0")):
        command = [sys.executable, "-c", CLIENT, str(port), str(arguments.batch), str(arguments.tokens), stream]
        clients[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    speeds: dict[str, list[float]] = {"engine": [], "streams": [], "whole": []}
    for _ in range(arguments.rounds):
        speeds["engine"].append(engine())
        for name, client in clients.items():
            speeds[name].append(through_http(client))
    ratios = {
        name: statistics.median(b / a for a, b in zip(speeds["engine"], speeds[name])) for name in ("streams", "whole")
    }

    def session(text: str) -> str:
        made, _ = post("/v1/sessions")
        messages = [{"role": "user", "content": text}]
        post("/v1/chat/completions", session_id=made["id"], messages=messages, max_tokens=1)
        return str(made["id"])

    story = "The old king went to the sea with a fox. "
    long = session(story * (arguments.long // len(served.tokenizer.encode(story))))
    short = session("The")
    waits: dict[str, list[float]] = {"long": [], "short": []}
    for _ in range(4 * arguments.rounds):
        for name, id in (("long", long), ("short", short)):
            messages = [{"role": "user", "content": " Then he said"}]
            waits[name].append(post("/v1/chat/completions", session_id=id, messages=messages, max_tokens=1)[1])
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, value in medians.items():
        print(f"{name:>8} {value:10,.0f} tokens/s {ratios.get(name, 1.0):8.0%} of the engine")
    for name, values in waits.items():
        print(f"{name:>8} session: first token after {1000 * statistics.median(values):.1f} ms")
    report = {"bench": "serve_overhead", "batch": arguments.batch, "tokens": arguments.tokens, "speeds": medians}
    waited = {name: statistics.median(values) for name, values in waits.items()}
    line = json.dumps({**report, "ratios": ratios, "waits": waited})
    if arguments.out:
        arguments.out.write_text(line + "\n")
    print(line)
    for client in clients.values():
        client.terminate()
    server.should_exit = True


if __name__ == "__main__":
    main()
