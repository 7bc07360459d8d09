"""Outcomes as JSON: one entry an item, the same in a whole answer and in a stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from starlette.responses import JSONResponse, Response

from promptmux_server.api.call import Call, CallItem, Outcome
from promptmux_server.api.errors import error_object, error_response
from promptmux_server.errors import PromptmuxError


def answers_response(call: Call, outcomes: Sequence[Outcome]) -> Response:
    """Answers in the order of the items, beside the errors of those that failed; if all did, the first error."""
    if (error := common_failure(outcomes)) is not None:
        return error_response(error, call.request_id)
    answers = [entry(item, outcome, call.request_id) for item, outcome in zip(call.items, outcomes, strict=True)]
    return Response(dump({"request_id": call.request_id, "answers": answers}), media_type=JSONResponse.media_type)


def common_failure(outcomes: Sequence[Outcome]) -> PromptmuxError | None:
    """The first error if every item failed."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, PromptmuxError)]
    return errors[0] if len(errors) == len(outcomes) else None


def entry(item: CallItem, outcome: Outcome, request_id: str) -> dict[str, Any]:
    """One member of `answers`."""
    fields = {"id": item.id, "task": item.task}
    if isinstance(outcome, PromptmuxError):
        return {**fields, "error": error_object(outcome, request_id)}
    return {
        **fields,
        "output": asdict(outcome.output),  # type: ignore[call-overload]
        "score": outcome.score,
        "prompt": asdict(outcome.prompt),
        "timings_ms": dict(outcome.timings_ms),
    }


def dump(value: Any) -> str:
    """JSON in ASCII and on one line, as an event's data must be."""
    return json.dumps(value, allow_nan=False)
