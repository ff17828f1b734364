"""Requests made at random from the server's own description: whatever comes, the answer is no failure of the server."""

import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

CASES = [600, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
ODD = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -1e308, "", "x", "\x00", "🦊" * 50, "../../etc/passwd",
    "a" * 5000, [], {}, [[]], [None], {"x": {"y": []}}, ["x"] * 50, "rwkv7-stories", [1, 2, 3], [[1], [70000]],
]  # fmt: skip
FEW = 4  # tokens, or a text would take long


class Maker:
    """Values that fit a schema, and values that do not."""

    def __init__(self, schema, rng):
        self.components, self.rng = schema.get("components", {}).get("schemas", {}), rng

    def value(self, schema, depth=0):
        rng = self.rng
        if rng.random() < 0.08:
            return rng.choice(ODD)
        if "$ref" in schema:
            return self.value(self.components[schema["$ref"].rsplit("/", 1)[1]], depth + 1)
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self.value(rng.choice(schema[word]), depth)
        if "enum" in schema or "const" in schema:
            return rng.choice(schema.get("enum", [schema.get("const")]))
        kind = schema.get("type")
        if kind == "object":
            return self.object(schema, depth)
        if kind == "array":
            least = schema.get("minItems", 0)
            return [self.value(schema.get("items", {}), depth + 1) for _ in range(rng.randint(least, least + 2))]
        if kind in ("integer", "number"):
            low, high = schema.get("minimum", -10), schema.get("maximum", 10)
            x = rng.choice([low, high, rng.uniform(low, min(high, low + 30))])
            return int(x) if kind == "integer" else x
        if kind == "boolean":
            return rng.random() < 0.5
        if kind == "string":
            return rng.choice(
                ["x", "The fox", "f", "a-b", "\n\nUser: x", "é🦊", 'start: "a"', "[a-c]{2}", '{"type": "object"}']
            )
        return None if kind == "null" else rng.choice(ODD)

    def object(self, schema, depth):
        properties = schema.get("properties", {})
        required = set(schema.get("required", ()))
        made = {
            name: self.value(inner, depth + 1)
            for name, inner in properties.items()
            if name in required or (depth < 6 and self.rng.random() < 0.3)
        }
        if not properties and self.rng.random() < 0.5:
            made[self.rng.choice(["type", "properties", "text", "role", "content", "x"])] = self.rng.choice(ODD)
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if name in properties and isinstance(made.get(name, 99), int) and not isinstance(made.get(name), bool):
                made[name] = min(made.get(name, 99), FEW)
        if made.get("options") is None and "options" in properties:
            made["options"] = {"num_predict": FEW}
        return made


def requests(schema, rng, count, known):
    """(method, path, body), over all routes."""
    maker = Maker(schema, rng)
    routes = [(m, p, op) for p, methods in schema["paths"].items() for m, op in methods.items()]
    for _ in range(count):
        method, path, operation = rng.choice(routes)
        path = path.replace("{id}", rng.choice([*known, "x", "..", "%00", "A", "sess-0"])).replace("{name}", "x")
        parameters = {
            p["name"]: rng.choice(["", "1", "-1", "x", "9" * 30, known[0]])
            for p in operation.get("parameters", ())
            if p["in"] == "query" and rng.random() < 0.5
        }
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        yield method.upper(), path, parameters, None if body is None else maker.value(body)


@pytest.mark.parametrize("count", CASES)
def test_no_request_makes_the_server_fail(server, count):
    rng = random.Random(11)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        schema = client.get("/openapi.json").json()
        known = [client.post("/v1/sessions", json={}).json()["id"] for _ in range(4)]

        def send(case):
            method, path, parameters, body = case
            answer = client.request(method, path, params=parameters, json=body)
            return case, answer.status_code, answer.elapsed.total_seconds()

        codes, slowest = {}, 0.0
        with ThreadPoolExecutor(8) as pool:
            for case, code, seconds in pool.map(send, requests(schema, rng, count, known)):
                assert code < 500, (code, case)
                codes[code] = codes.get(code, 0) + 1
                slowest = max(slowest, seconds)
        assert codes[200] > count // 20, codes
        assert codes[400] > count // 20, codes
        assert client.get("/health").status_code == 200
        assert slowest < 30  # a turn waits 10 s for another one of its session, and then gives up with 409
        print(sum(codes.values()), "requests", codes, f"slowest {slowest:.2f} s")
    server.wait_until(lambda: server.app.hub.models.texts == 0)
