"""What a client is told when something goes wrong: OpenAI's error object."""

from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException


class ApiError(HTTPException):  # which FastAPI lets through where a body is being read
    """retry_after: seconds after which the client may try again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": kind(self.status), "code": self.code, "param": self.param}}


def kind(status: int) -> str:
    known = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
        503: "service_unavailable_error",
    }
    return known.get(status, "invalid_request_error" if status < 500 else "server_error")


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def failed() -> ApiError:
    return ApiError(500, "the server failed; its log says more", code="internal_error")


def not_found(what: str, name: str, param: str | None = None) -> ApiError:
    return ApiError(404, f"there is no {what} {name[:200]!r}", code=f"{what}_not_found", param=param)


def first_fault(errors: Sequence[Any]) -> tuple[str, str]:
    """(field, message) of what pydantic found first, without the value, which may be anything.

    Where a field may be of several kinds there is a fault for each: that of the kind which fits best is told.
    """
    field = errors[0]["loc"][:2]
    fault = max(
        (error for error in errors if error["loc"][:2] == field),
        key=lambda error: (not error["type"].endswith(("_type", "_parsing")), len(error["loc"])),
    )
    parts = [str(x) for x in fault["loc"] if x not in ("body", "query", "path")]
    where = ".".join(x for x in parts if "[" not in x and not x.startswith("constrained-"))  # names of kinds
    return where, f"{where}: {fault['msg']}" if where else str(fault["msg"])
