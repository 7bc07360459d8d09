"""Everything this client raises, as one tree.

PromptmuxError
├── ConnectionFailed          the server cannot be reached
├── RequestTimeout            no answer within the client's own timeout
├── CorruptDownload           a file came that is not the one the server announced
└── APIStatusError            the server said no; has status, code, param, request_id, retryable, details
    ├── BadRequest            400
    ├── Unauthorized          401
    ├── Forbidden             403
    ├── NotFound              404
    │   └── VersionNotFound        that version was never published, or is kept no longer
    ├── MethodNotAllowed      405
    ├── Conflict              409
    │   └── RegistryFull           no room for another name
    ├── VersionMismatch       412  the prompt is not at the version that the change was made for
    ├── TooLarge              413, 431
    ├── UnsupportedMediaType  415
    ├── InvalidRequest        422
    │   └── CanaryFailed           with this prompt the server's answers are not the publisher's; see details
    ├── RateLimited           429
    └── ServerError           any other 5xx
        ├── Overloaded        503
        │   └── StorageFailed      the disk failed; the version before still stands
        ├── DeadlineExceeded  504
        └── StorageFull       507
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class PromptmuxError(Exception):
    """Root of the tree."""


class ConnectionFailed(PromptmuxError):
    """The server cannot be reached."""


class RequestTimeout(PromptmuxError):
    """No answer came within the client's timeout."""


class CorruptDownload(PromptmuxError):
    """The bytes of a file do not have the sha256 that came with them."""


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
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{message} [{code}]")
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retryable = retryable
        self.details = details or {}
        """What the code alone does not say, such as the tokens that a canary expected and got."""


class BadRequest(APIStatusError):
    """400"""


class Unauthorized(APIStatusError):
    """401"""


class Forbidden(APIStatusError):
    """403"""


class NotFound(APIStatusError):
    """404"""


class VersionNotFound(NotFound):
    """404, `version_not_found`: never published, or kept no longer."""


class MethodNotAllowed(APIStatusError):
    """405"""


class Conflict(APIStatusError):
    """409"""


class RegistryFull(Conflict):
    """409, `registry_full`: delete a prompt, or let the server keep more."""


class VersionMismatch(APIStatusError):
    """412: somebody has published since, or the name exists already."""


class TooLarge(APIStatusError):
    """413, 431"""


class UnsupportedMediaType(APIStatusError):
    """415"""


class InvalidRequest(APIStatusError):
    """422"""


class CanaryFailed(InvalidRequest):
    """422, `canary_failed`; `details` has `index`, `expected` and `got` token ids, or a `reason`."""


class RateLimited(APIStatusError):
    """429"""


class ServerError(APIStatusError):
    """5xx"""


class Overloaded(ServerError):
    """503"""


class StorageFailed(Overloaded):
    """503, `storage_failed`: nothing was published."""


class DeadlineExceeded(ServerError):
    """504"""


class StorageFull(ServerError):
    """507: nothing was published."""


BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    405: MethodNotAllowed,
    409: Conflict,
    412: VersionMismatch,
    413: TooLarge,
    415: UnsupportedMediaType,
    422: InvalidRequest,
    429: RateLimited,
    431: TooLarge,
    503: Overloaded,
    504: DeadlineExceeded,
    507: StorageFull,
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


SPECIAL: dict[str, type[APIStatusError]] = {
    "version_not_found": VersionNotFound,
    "registry_full": RegistryFull,
    "canary_failed": CanaryFailed,
    "storage_failed": StorageFailed,
}
"""Codes with a class of their own below that of their status."""


def class_for(status: int, code: str = "") -> type[APIStatusError]:
    """The class of a refusal."""
    return SPECIAL.get(code) or BY_STATUS.get(status, ServerError if status >= 500 else APIStatusError)
