"""Requests that schemathesis makes from `/openapi.json`: no answer is a failure, or other than the description says."""

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings  # noqa: E402
from schemathesis import GenerationMode, checks  # noqa: E402

CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_what_schemathesis_makes_of_every_route_is_answered_as_described(program, tiny_folder, count):
    """Half of the cases fit the description, half do not. At most 4 tokens each, or a case would take long."""
    process, client = program(tiny_folder, "limits.max_tokens=4", "log.level=error")
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 28
    known = [client.post("/v1/sessions", json={}).json()["id"] for _ in range(8)]
    told, slowest = {}, 0.0
    chosen = [checks.CHECKS.get_one(name) for name in CHECKS]

    def send(case):
        nonlocal slowest
        number = sum(told.values())
        if "id" in (case.path_parameters or {}) and number % 2:
            case.path_parameters["id"] = known[number % len(known)]  # or nearly none would be found
        answer = case.call(timeout=30)
        told[answer.status_code] = told.get(answer.status_code, 0) + 1
        slowest = max(slowest, answer.elapsed)
        case.validate_response(answer, checks=chosen)

    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @seed(11)
            @settings(
                max_examples=max(1, count // (2 * len(operations))), deadline=None, database=None,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet,
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def cases(case):
                send(case)

            try:
                cases()
            except Exception as error:
                if type(error).__name__ != "Unsatisfiable":  # a route without anything that could be wrong
                    raise
    print(sum(told.values()), "cases", told, f"slowest {slowest:.2f} s")
    assert sum(told.values()) > count // 2
    assert told[200] > count // 50
    assert told[400] > count // 50
    assert slowest < 10
    assert process.poll() is None
    assert client.get("/ready").status_code == 200
