"""POST /v1/fanout: one picture and text, many tasks. The picture is sent once and decoded once.

Owns which task gets what: what stands at the top of the body goes to the tasks that take it, so that a captioner may
stand beside a question; what stands at a task goes to that task as it is, taken or not.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from promptmux_server.api.body import read_json
from promptmux_server.api.call import CallItem
from promptmux_server.api.desk import Desk
from promptmux_server.api.pictures import Picture
from promptmux_server.api.schemas import FanoutRequest, FanoutTask, decoding_of, parse_fanout
from promptmux_server.engine.request import EnginePort, TaskInputs

NOTHING = TaskInputs(kind="", takes_text=False, takes_premise=False, takes_image=False)


class Fanout:
    """The route."""

    def __init__(self, desk: Desk, engine: EnginePort) -> None:
        self._desk, self._engine = desk, engine

    async def __call__(self, request: Request) -> Response:
        asked = parse_fanout(await read_json(request))
        self._desk.check(asked, len(asked.tasks), "tasks")
        picture = None if asked.image is None else Picture(asked.image)
        # A name that is not known gets nothing to complain about but its name.
        items = [
            _item(index, asked, task, picture, self._engine.inputs(task.task) or NOTHING)
            for index, task in enumerate(asked.tasks)
        ]
        return await self._desk.reply(request, asked, items)


def _item(index: int, asked: FanoutRequest, task: FanoutTask, picture: Picture | None, takes: TaskInputs) -> CallItem:
    return CallItem(
        id=str(index),
        task=task.task,
        text=asked.text if task.text is None and takes.takes_text else task.text,
        premise=asked.premise if task.premise is None and takes.takes_premise else task.premise,
        decoding=decoding_of(task),
        picture=picture.shared() if picture is not None and takes.takes_image else None,
    )
