"""Refusals, in the shape that OpenAI's clients read: a status, one sentence, and what it is about."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered by an error.

    Args:
        status: of HTTP; 4xx: the request is at fault, 5xx: the server is.
        message: one sentence.
        code: a word that programs compare.
        param: the field that is at fault.
        retry: whether the same request may succeed a moment later.
    """

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None, retry: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None) -> ApiError:
    """Make the error of a request whose field is wrong."""
    return ApiError(400, message, "invalid_value", param=param)
