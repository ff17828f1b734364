"""What a client is told when something goes wrong: OpenAI's error object."""

from typing import Any


class ApiError(Exception):
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
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": kind(self.status), "code": self.code, "param": self.param}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


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


def not_found(what: str, name: str, param: str | None = None) -> ApiError:
    return ApiError(404, f"there is no {what} {name[:200]!r}", code=f"{what}_not_found", param=param)
