"""Every error the server can name, as one drawn tree with stable codes.

Owns the codes, HTTP statuses and retry hints. Refuses to know how an error is rendered: `api/errors.py` is
the one place that turns an exception into an answer.

    PromptmuxError                     500  internal
    ├── RequestError                   400  bad_request            the caller's mistake
    │   ├── BadRequest                 400  bad_request
    │   ├── MalformedJson              400  malformed_json
    │   ├── MalformedImage             400  malformed_image
    │   ├── Unauthorized               401  unauthorized
    │   ├── Forbidden                  403  forbidden
    │   ├── PromptNotFound             404  prompt_not_found
    │   ├── VersionNotFound            404  version_not_found      the name has no such version, or none that is kept
    │   ├── JobNotFound                404  job_not_found
    │   ├── TrainingsOff               403  trainings_off          this server takes no trainings over HTTP
    │   ├── RouteNotFound              404  route_not_found
    │   ├── MethodNotAllowed           405  method_not_allowed
    │   ├── RegistryFull               409  registry_full          no further names
    │   ├── IdempotencyConflict        409  idempotency_conflict   one key, two different jobs
    │   ├── JobConflict                409  job_conflict           another job that has not ended uses the same folder
    │   ├── VersionMismatch            412  version_mismatch       the name stands for another version than expected
    │   ├── BodyTooLarge               413  body_too_large
    │   ├── ImageTooLarge              413  image_too_large
    │   ├── UnsupportedMediaType       415  unsupported_media_type
    │   ├── InvalidParameter           422  invalid_parameter
    │   ├── PromptRefused              422  invalid_prompt_file    a prompt file that the reader refuses
    │   │   ├── PromptShapeMismatch    422  prompt_shape_mismatch
    │   │   ├── PromptNonfinite        422  prompt_nonfinite
    │   │   ├── PromptDigestMismatch   422  prompt_digest_mismatch
    │   │   ├── PromptBackboneMismatch 422  prompt_backbone_mismatch
    │   │   ├── PromptTooLarge         422  prompt_too_large       more pages than the device's pool can spare
    │   │   └── CanaryFailed           422  canary_failed          does not answer as its publisher saw it answer
    │   ├── PinRefused                 422  pin_refused            pinning it would leave other prompts no room
    │   ├── NoBoxFound                 422  no_box                 the output of the model is not a box
    │   ├── TenantQueueFull            429  tenant_queue_full      the caller's own share is used up
    │   ├── HeaderTooLarge             431  header_too_large
    │   └── ClientLeft                 499  client_left            log and metrics only
    ├── Unavailable                    503  backend_unhealthy      the server's state; worth a retry
    │   ├── Overloaded                 503  overloaded
    │   ├── Draining                   503  draining
    │   ├── BackendUnhealthy           503  backend_unhealthy
    │   ├── PromptQuarantined          503  prompt_quarantined
    │   ├── StorageFailed              503  storage_failed         the disk; what was served still is
    │   └── NonfiniteOutput            503  nonfinite_output       this row only, its neighbours are unharmed
    ├── StorageFull                    507  storage_full           no room on the disk; nothing has changed
    ├── DeadlineExceeded               504  deadline_exceeded
    ├── Internal                       500  internal               a bug
    ├── BackboneError                  500  backbone_error         raised while a backbone is read
    │   ├── BackboneNotFound           500  backbone_not_found
    │   ├── BackboneFileError          500  backbone_invalid
    │   ├── BackboneKeysError          500  backbone_keys_mismatch
    │   └── UnsafePickle               500  backbone_unsafe_pickle
    ├── TrainingError                  500  training_failed        a run cannot go on; what it saved stands
    │   ├── TrainingDiverged           500  training_diverged      its loss or gradient is no number any more
    │   ├── RunHeld                    500  run_held               another process trains into the same folder
    │   ├── PeerLost                   500  peer_lost              another process of the same run ended or is silent
    │   └── CheckpointNotWritten       500  checkpoint_not_written the disk; earlier checkpoints stand
    ├── ExtraMissing                   500  extra_missing          an optional package is not installed
    ├── LeaseLost                      500  lease_lost             another worker has the job
    ├── TrainingConfigError            422  invalid_training_config
    └── DataError                      422  invalid_training_data  raised while training data are read
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar


class PromptmuxError(Exception):
    """Root of the tree. `message` is shown to the caller: it says what to do; it holds no input and no path."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        """`param` names the request field at fault; `retry_after_s` (1 to 30) goes out as `Retry-After`.

        `details` are for programs: small, and JSON.
        """
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.details = details


class RequestError(PromptmuxError):
    """The caller has to change something before it sends this again."""

    code = "bad_request"
    status = 400


class BadRequest(RequestError):
    """The request cannot be understood, for a reason that has no name of its own."""


class MalformedJson(RequestError):
    """The body is not the strict JSON that is accepted here (NaN, surrogates, duplicate keys, depth...)."""

    code = "malformed_json"


class MalformedImage(RequestError):
    """The image is not base64 of a readable PNG, JPEG or WebP."""

    code = "malformed_image"


class Unauthorized(RequestError):
    """No bearer token, or one that is not known."""

    code = "unauthorized"
    status = 401


class Forbidden(RequestError):
    """The token is known and lacks the scope."""

    code = "forbidden"
    status = 403


class PromptNotFound(RequestError):
    """No task of that name is served; also for names that break the name rule."""

    code = "prompt_not_found"
    status = 404


class VersionNotFound(RequestError):
    """The name has no such version, or does not keep it any more."""

    code = "version_not_found"
    status = 404


class TrainingsOff(RequestError):
    """The server was started without a folder that trainings asked for over HTTP may use."""

    code = "trainings_off"
    status = 403


class RouteNotFound(RequestError):
    """No such path."""

    code = "route_not_found"
    status = 404


class JobNotFound(RequestError):
    """No job has this id."""

    code = "job_not_found"
    status = 404


class IdempotencyConflict(RequestError):
    """An idempotency key that stands for another job."""

    code = "idempotency_conflict"
    status = 409


class JobConflict(RequestError):
    """Another job that has not ended uses what this one would."""

    code = "job_conflict"
    status = 409


class MethodNotAllowed(RequestError):
    """The path exists and does not take this method."""

    code = "method_not_allowed"
    status = 405


class RegistryFull(RequestError):
    """The registry holds as many names as it may."""

    code = "registry_full"
    status = 409


class VersionMismatch(RequestError):
    """The name does not stand for the version that the caller expected."""

    code = "version_mismatch"
    status = 412


class BodyTooLarge(RequestError):
    """The body is over the limit, by its declared length or while it was read."""

    code = "body_too_large"
    status = 413


class ImageTooLarge(RequestError):
    """The image is over the limit in bytes, pixels or side length."""

    code = "image_too_large"
    status = 413


class UnsupportedMediaType(RequestError):
    """The Content-Type is not on the closed list."""

    code = "unsupported_media_type"
    status = 415


class InvalidParameter(RequestError):
    """Well-formed, but a field is missing, unknown, of the wrong type or out of range."""

    code = "invalid_parameter"
    status = 422


class PromptRefused(RequestError):
    """A prompt file that cannot be served; `promptmux_prompts` has the same codes for whoever reads files alone."""

    code = "invalid_prompt_file"
    status = 422


class PromptShapeMismatch(PromptRefused):
    """Tensors of another model size, or of other lengths than the manifest says."""

    code = "prompt_shape_mismatch"


class PromptNonfinite(PromptRefused):
    """NaN, Inf or absurdly large values."""

    code = "prompt_nonfinite"


class PromptDigestMismatch(PromptRefused):
    """The content is not what was announced."""

    code = "prompt_digest_mismatch"


class PromptBackboneMismatch(PromptRefused):
    """The prompt was trained for another backbone."""

    code = "prompt_backbone_mismatch"


class PromptTooLarge(PromptRefused):
    """It needs more room than the device's prompt pool has beside what is pinned there."""

    code = "prompt_too_large"


class CanaryFailed(PromptRefused):
    """On this server the prompt answers otherwise than its publisher saw, or as if it were not there."""

    code = "canary_failed"


class PinRefused(RequestError):
    """Pinning this prompt would leave too little room for the largest of the others."""

    code = "pin_refused"
    status = 422


class NoBoxFound(RequestError):
    """A grounding task whose output names no box: nothing in the picture answers to the text."""

    code = "no_box"
    status = 422


class TenantQueueFull(RequestError):
    """The caller has used up its own share of the queue; others are still served."""

    code = "tenant_queue_full"
    status = 429
    retryable = True


class HeaderTooLarge(RequestError):
    """Request line and headers together are over the limit."""

    code = "header_too_large"
    status = 431


class ClientLeft(RequestError):
    """The client closed the connection. Nobody reads this one: it exists for logs and metrics."""

    code = "client_left"
    status = 499


class Unavailable(PromptmuxError):
    """The server cannot answer now, whatever the request; a retry may succeed."""

    code = "backend_unhealthy"
    status = 503
    retryable = True


class Overloaded(Unavailable):
    """The queue of the whole server is full."""

    code = "overloaded"


class Draining(Unavailable):
    """The server is shutting down."""

    code = "draining"


class BackendUnhealthy(Unavailable):
    """The engine is not ready, or its thread has died."""


class PromptQuarantined(Unavailable):
    """The prompt's file failed its checks; the task is known and not served."""

    code = "prompt_quarantined"


class StorageFailed(Unavailable):
    """The disk failed; nothing was published, and what was served still is."""

    code = "storage_failed"


class NonfiniteOutput(Unavailable):
    """This request's logits were not finite; no other request of the batch is affected."""

    code = "nonfinite_output"


class StorageFull(PromptmuxError):
    """The disk has no room; nothing has changed."""

    code = "storage_full"
    status = 507


class DeadlineExceeded(PromptmuxError):
    """The request's own deadline passed before its answer was ready."""

    code = "deadline_exceeded"
    status = 504
    retryable = True


class Internal(PromptmuxError):
    """A bug: an invariant of ours does not hold."""


class BackboneError(PromptmuxError):
    """A backbone cannot be used. Raised at load time and by `promptmux convert`, never for a request."""

    code = "backbone_error"


class BackboneNotFound(BackboneError):
    """There is no backbone at the place given."""

    code = "backbone_not_found"


class BackboneFileError(BackboneError):
    """A file of the backbone cannot be read as what it claims to be."""

    code = "backbone_invalid"


class BackboneKeysError(BackboneError):
    """The tensors found are not the tensors that the configuration asks for."""

    code = "backbone_keys_mismatch"

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshaped: Sequence[str] = (),
    ) -> None:
        """The lists hold tensor names (`misshaped` with both shapes in words); the text of the error has all."""
        groups = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        lines = [f"{title}: {', '.join(names)}" for title, names in groups if names]
        super().__init__("\n".join([message, *lines]))
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshaped = tuple(misshaped)


class UnsafePickle(BackboneError):
    """The pickle asks for a class or function that is not on the allow-list; nothing of it was run."""

    code = "backbone_unsafe_pickle"


class TrainingError(PromptmuxError):
    """One training run cannot go on. Its neighbours can, and what it saved before stands."""

    code = "training_failed"


class TrainingDiverged(TrainingError):
    """A run's loss or gradient is not finite. Its parameters are those of the step before."""

    code = "training_diverged"

    def __init__(self, run: str, step: int, what: str, checkpoint: str | None = None) -> None:
        """`step` counts from 1; `what` is "loss" or "gradient"; `checkpoint` names the last one that is good."""
        kept = f"The last checkpoint, {checkpoint}, is from before it. " if checkpoint else ""
        super().__init__(
            f"Run {run}: the {what} is not finite at step {step}. {kept}"
            "Go on from an earlier checkpoint with a lower learning rate, or check the data."
        )
        self.run, self.step, self.what = run, step, what


class RunHeld(TrainingError):
    """Another process writes this run's checkpoints."""

    code = "run_held"


class PeerLost(TrainingError):
    """A run of several processes has lost one."""

    code = "peer_lost"

    def __init__(self) -> None:
        super().__init__(
            "Another process of this run has ended or does not answer: what it said itself tells why. "
            "The same command goes on from the last checkpoint."
        )


class CheckpointNotWritten(TrainingError):
    """The disk did not take what a run wants to keep. Earlier checkpoints stand."""

    code = "checkpoint_not_written"


class ExtraMissing(PromptmuxError):
    """The command needs packages that only an extra brings."""

    code = "extra_missing"

    def __init__(self, extra: str, package: str) -> None:
        super().__init__(f"This needs {package}, which is not installed: pip install 'promptmux-server[{extra}]'.")


class LeaseLost(PromptmuxError):
    """A worker spoke for a job that is no longer its own."""

    code = "lease_lost"


class TrainingConfigError(PromptmuxError):
    """A training configuration that cannot be followed; the message names line and field, and what is allowed."""

    code = "invalid_training_config"
    status = 422


class DataError(PromptmuxError):
    """Training data that cannot be learned from. Raised when they are opened, checked and read, never for a request.

    The message names a file, never its folder, and where in it the fault lies.
    """

    code = "invalid_training_data"
    status = 422
