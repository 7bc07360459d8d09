"""What a server's refusal of a prompt means for the person at the terminal, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from promptmux_server.cli.output import fail

if TYPE_CHECKING:
    from promptmux import Client, PromptmuxError, VersionMismatch


@contextmanager
def connected(url: str, name: str = "") -> Iterator[Client]:
    """A client of the server; what it raises about the prompt `name` is explained and ends the command."""
    from promptmux import Client, PromptmuxError

    with Client(url) as client:
        try:
            yield client
        except (PromptmuxError, ValueError) as error:
            fail(told(error, client, name))


def told(error: PromptmuxError | ValueError, client: Client, name: str) -> str:
    """What an error about the prompt `name` means; a ValueError is what the client does not even send."""
    from promptmux import PromptmuxError, VersionMismatch

    if isinstance(error, VersionMismatch):
        return moved_on(error, client, name)
    return explain(error) if isinstance(error, PromptmuxError) else str(error)


def explain(error: PromptmuxError) -> str:
    """The error's own text, and what it does not say by itself."""
    from promptmux import CanaryFailed, Forbidden, Unauthorized

    if isinstance(error, CanaryFailed):
        return "\n".join([str(error), *_canary(error.details), "Nothing was published."])
    if isinstance(error, Unauthorized):
        return "this server asks for a key: put one into PROMPTMUX_API_KEY"
    if isinstance(error, Forbidden):
        return (
            "the key in PROMPTMUX_API_KEY may not do this: to change prompts and to fetch files it needs the scope "
            "`admin`, to look at prompts `infer`"
        )
    return str(error)


def moved_on(error: VersionMismatch, client: Client, name: str) -> str:
    """Which version a name stands for now, after a change that was made for another one."""
    from promptmux import NotFound, PromptmuxError

    try:
        current = client.prompts.get(name)
    except NotFound:
        return f"{name} does not exist, so it has no version: push it without --if-version, or with --new"
    except PromptmuxError:
        return str(error)
    return (
        f"{name} is at version {current.version}, published by {current.author} at {current.created:%Y-%m-%d %H:%M:%S} "
        f"UTC; nothing was changed.\nSee `promptmux prompts versions {name}`; to go on from there, say --if-version "
        f"{current.version}"
    )


def _canary(details: Mapping[str, Any]) -> list[str]:
    """That nothing changes with the prompt, or the two outputs one below the other, what differs in brackets."""
    if details.get("reason") == "no_effect":
        return ["With this prompt the model computes the same as without it: its numbers have no effect."]
    expected, got = details.get("expected"), details.get("got")
    if not isinstance(expected, list) or not isinstance(got, list):
        return []
    pairs = [(str(a), str(b) if a == b else f"[{b}]") for a, b in zip_longest(expected, got, fillvalue="-")]
    first = " ".join(a.rjust(len(b)) for a, b in pairs)
    second = " ".join(b.rjust(len(a)) for a, b in pairs)
    return [f"Output tokens of canary {details.get('index')}:", f"  expected  {first}", f"  got       {second}"]
