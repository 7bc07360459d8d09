"""Everything this client raises, as one tree.

PromptmuxError
├── ConnectionFailed          the server cannot be reached
├── RequestTimeout            no answer within the client's own timeout
└── APIStatusError            the server said no; has status, code, param, request_id, retryable
    ├── BadRequest            400
    ├── Unauthorized          401
    ├── Forbidden             403
    ├── NotFound              404
    ├── MethodNotAllowed      405
    ├── TooLarge              413, 431
    ├── UnsupportedMediaType  415
    ├── InvalidRequest        422
    ├── RateLimited           429
    └── ServerError           any other 5xx
        ├── Overloaded        503
        └── DeadlineExceeded  504
"""

from __future__ import annotations


class PromptmuxError(Exception):
    """Root of the tree."""


class ConnectionFailed(PromptmuxError):
    """The server cannot be reached."""


class RequestTimeout(PromptmuxError):
    """No answer came within the client's timeout."""


class APIStatusError(PromptmuxError):
    """The server refused. `status` is the HTTP status, 200 for the error of a single item of a call."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str = "unknown",
        param: str | None = None,
        request_id: str | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(f"{message} [{code}]")
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retryable = retryable


class BadRequest(APIStatusError):
    """400"""


class Unauthorized(APIStatusError):
    """401"""


class Forbidden(APIStatusError):
    """403"""


class NotFound(APIStatusError):
    """404"""


class MethodNotAllowed(APIStatusError):
    """405"""


class TooLarge(APIStatusError):
    """413, 431"""


class UnsupportedMediaType(APIStatusError):
    """415"""


class InvalidRequest(APIStatusError):
    """422"""


class RateLimited(APIStatusError):
    """429"""


class ServerError(APIStatusError):
    """5xx"""


class Overloaded(ServerError):
    """503"""


class DeadlineExceeded(ServerError):
    """504"""


BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    405: MethodNotAllowed,
    413: TooLarge,
    415: UnsupportedMediaType,
    422: InvalidRequest,
    429: RateLimited,
    431: TooLarge,
    503: Overloaded,
    504: DeadlineExceeded,
}

BY_CODE: dict[str, type[APIStatusError]] = {
    "prompt_not_found": NotFound,
    "malformed_image": BadRequest,
    "image_too_large": TooLarge,
    "invalid_parameter": InvalidRequest,
    "no_box": InvalidRequest,
    "overloaded": Overloaded,
    "draining": Overloaded,
    "backend_unhealthy": Overloaded,
    "prompt_quarantined": Overloaded,
    "nonfinite_output": Overloaded,
    "deadline_exceeded": DeadlineExceeded,
    "internal": ServerError,
}
"""For the error of a single item, which has a code and no status."""


def class_for(status: int) -> type[APIStatusError]:
    """The class of an HTTP status."""
    return BY_STATUS.get(status, ServerError if status >= 500 else APIStatusError)
