"""Requests to a server at random times, whether or not earlier ones have ended. Needs httpx."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from receptance.errors import ReceptanceError

PERCENTILES = (50, 90, 99)


@dataclass
class Result:
    """Seconds of all requests that were answered at one rate."""

    rate: float
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0  # 429 and 503
    failed: int = 0

    def report(self) -> dict[str, Any]:
        return {
            "rate": self.rate,
            "seconds": self.seconds,
            "answered": len(self.whole),
            "refused": self.refused,
            "failed": self.failed,
            "tokens_per_s": self.tokens / self.seconds,
            "first_token_s": percentiles(self.first),
            "between_tokens_s": percentiles(self.between),
            "request_s": percentiles(self.whole),
        }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in PERCENTILES}


@dataclass
class Load:
    url: str
    model: str | None
    key: str | None
    prompts: list[int]
    outputs: list[int]
    seed: int

    async def run(self, rate: float, seconds: float) -> Result:
        """Send requests for so long, wait until all are answered. Raises ReceptanceError where no server is."""
        rng, result, tasks = random.Random(self.seed), Result(rate), []
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=1000)
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=600, limits=limits) as client:
            vocabulary = await self._words(client)
            began = time.perf_counter()
            due = began
            while (due := due + rng.expovariate(rate)) < began + seconds:
                body = {
                    "model": self.model,
                    "prompt": rng.choices(vocabulary, k=rng.choice(self.prompts)),
                    "max_tokens": rng.choice(self.outputs),
                    "ignore_eos": True,
                    "stream": True,
                    "seed": rng.randrange(1 << 30),
                }
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.ensure_future(self._request(client, body, due, result)))
            await asyncio.gather(*tasks)
            result.seconds = time.perf_counter() - began
        return result

    async def _words(self, client: httpx.AsyncClient) -> list[int]:
        """Token ids of plain text. Raises ReceptanceError with what the server says against it."""
        text = (
            "The old king went to the sea with a fox, and there they met a bear who had lost his way home in the snow."
        )
        try:
            answer = await client.post("/tokenize", json={"model": self.model, "prompt": text})
            told = answer.json()
            if answer.is_success:
                return list(told["tokens"])
            raise ReceptanceError(f"{self.url}: {told['error']['message']}")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ReceptanceError(f"{self.url} does not answer ({error})") from None
        except (ValueError, LookupError, TypeError):
            raise ReceptanceError(f"{self.url} is no server of ours ({answer.status_code})") from None

    async def _request(self, client: httpx.AsyncClient, body: dict[str, Any], due: float, result: Result) -> None:
        """Times count from when the request was due, however late this program was."""
        last, is_whole = 0.0, False
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code in (429, 503):
                    result.refused += 1
                    return
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        is_whole = True
                    elif line.startswith("data: ") and json.loads(line[6:])["choices"][0]["text"]:
                        now = time.perf_counter()
                        (result.between if last else result.first).append(now - (last or due))
                        last = now
        except (httpx.HTTPError, ValueError, LookupError):
            is_whole = False
        if is_whole:
            result.whole.append(time.perf_counter() - due)
            result.tokens += body["max_tokens"]
        else:
            result.failed += 1
