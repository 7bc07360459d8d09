"""POST /v1/predict: items of any tasks, in one call and one batch."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from promptmux_server.api.body import read_json
from promptmux_server.api.call import CallItem
from promptmux_server.api.desk import Desk
from promptmux_server.api.pictures import Picture
from promptmux_server.api.schemas import PredictItem, decoding_of, parse_predict


class Predictor:
    """The route: each item brings its own picture and text."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def __call__(self, request: Request) -> Response:
        asked = parse_predict(await read_json(request))
        self._desk.check(asked, len(asked.items), "items")
        return await self._desk.reply(request, asked, (_item(i, item) for i, item in enumerate(asked.items)))


def _item(index: int, item: PredictItem) -> CallItem:
    return CallItem(
        id=str(index) if item.id is None else item.id,
        task=item.task,
        text=item.text,
        premise=item.premise,
        decoding=decoding_of(item),
        picture=None if item.image is None else Picture(item.image).shared(),
    )
