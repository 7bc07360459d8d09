"""At the door: from a request to a ticket, or the error that tells the caller what to change.

Owns what can be checked before anything is computed. Knows nothing of queues or batches.
"""

from __future__ import annotations

from itertools import count

from promptmux_server.backbone.image_key import ImageKey
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.engine.decoding import TextStream, make_search
from promptmux_server.engine.memory import DecodingMemory
from promptmux_server.engine.pictures import Pictures
from promptmux_server.engine.prompt_versions import Lease
from promptmux_server.engine.registry import ServedTask
from promptmux_server.engine.request import Request
from promptmux_server.engine.ticket import Ticket
from promptmux_server.errors import InvalidParameter
from promptmux_server.tasks import EncodedItem, encode_item
from promptmux_server.tasks.decoding import DecodingParams


class Admission:
    """Makes tickets; may be called from any thread."""

    def __init__(
        self, model: OFA, tokenizer: Tokenizer, pictures: Pictures, memory: DecodingMemory, *, deterministic: bool
    ) -> None:
        self._limit = model.config.max_positions
        self._tokenizer, self._pictures, self._memory = tokenizer, pictures, memory
        self._deterministic = deterministic
        self._rows = count()

    def ticket(self, request: Request, task: ServedTask, lease: Lease) -> Ticket:
        """Raises InvalidParameter for a request that this task, or this server, cannot answer."""
        spec = task.spec
        if spec.takes_image and request.image is None and not spec.takes_text:
            raise InvalidParameter("This task needs a picture: send `image` as base64.", param="image")
        if request.image is not None and not spec.takes_image:
            raise InvalidParameter("This task takes no picture: leave `image` out.", param="image")
        params = spec.decoding.merged(request.decoding or {})
        item = encode_item(spec, self._tokenizer, request.text, request.premise)
        check_lengths(item, params, self._limit)
        alone = self._deterministic or request.deterministic
        picture = None
        if request.image is not None:
            key = ImageKey(request.image.digest, spec.image_size, spec.image_mean, spec.image_std, alone)
            picture = self._pictures.find(request.image, key)
        search = make_search(params, candidates=item.candidates, prefix=item.prefix_ids)
        text = TextStream(search, self._tokenizer, spec.kind, request.on_text)
        ticket = Ticket(request, task, lease, item, search, text, picture, alone, next(self._rows))
        if not self._memory.fits(ticket.slots, ticket.memory_length):
            raise InvalidParameter(
                "This request needs more decoding memory than the server has: ask for fewer beams or tokens, or raise "
                "PROMPTMUX_DECODE_CACHE_BYTES and PROMPTMUX_CROSS_MEMORY_BYTES.",
                param="decoding",
            )
        return ticket


def check_lengths(item: EncodedItem, params: DecodingParams, limit: int) -> None:
    """Raise InvalidParameter for an item whose source, or longest answer, has no place among `limit` positions."""
    longest = max((len(answer) for answer in item.candidates or ()), default=params.max_length) + 1
    if len(item.source_ids) > limit or len(item.prefix_ids) + longest > limit:
        raise InvalidParameter(f"The text is too long for this backbone's {limit} positions.", param="text")
