"""Errors as OpenAI's API gives them: `{"error": {"message", "type", "param", "code"}}`. Nothing of the inside shows."""

import math
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rankfold.errors import RankfoldError
from rankfold.serve.engine import AdapterInUseError, ClosedError
from rankfold.serve.library import UnknownAdapterError
from rankfold.serve.request import OverloadedError

_UNKNOWN_FIELD = "there is no such parameter"


class ApiError(Exception):
    """An answer that is an error: its HTTP status, and what to tell."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {
            "error": {
                # Half a pair of surrogates, that a client may have sent, is no text.
                "message": str(self).encode("utf-8", "replace").decode(),
                "type": "server_error" if self.status >= 500 else kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """How to tell a client of any error."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error.errors()[0])
        case HTTPException():
            headers = None if error.headers is None else dict(error.headers)
            return ApiError(error.status_code, str(error.detail), headers=headers)
        case OverloadedError():
            seconds = str(min(60, math.ceil(error.retry_after)))
            return ApiError(429, str(error), code="overloaded", headers={"Retry-After": seconds})
        case UnknownAdapterError():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case ClosedError():
            return ApiError(503, "the server is shutting down")
        case AdapterInUseError():
            return ApiError(409, str(error), code="adapter_in_use")
        case RankfoldError():
            return ApiError(400, str(error))
    return ApiError(500, "something went wrong in the server; its log says what")


def _invalid(found: dict[str, Any]) -> ApiError:
    where = [str(part) for part in found["loc"][1:]]
    param = found.get("ctx", {}).get("param") or (where[0] if where else None)
    if found["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON")
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(where)}: {_UNKNOWN_FIELD}", param=param, code="unknown_parameter")
    if not where and param is None:
        return ApiError(400, "the body has to be a JSON object, sent as application/json")
    at = ".".join(where) or param
    return ApiError(400, f"{at}: {found['msg']}", param=param)
