"""Publish a prompt, then a worse one, and roll back, while requests are answered: `promptmux serve`, then run this.

Everything here is public: the client, and the reader of prompt files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from safetensors.torch import load, save

from promptmux import Client, PromptVersion
from promptmux_prompts.header import METADATA_KEY, read_header

PICTURE = Path(__file__).parent / "scene-01.png"
NAME = "my-caption"


def weaker(file: bytes) -> bytes:
    """The same prompt with its vectors shrunk, as from a training that was stopped early.

    Without its canaries, the answers it was published with: the server would see that others come out, and refuse it.
    """
    shrunk = {name: tensor / 4 for name, tensor in load(file).items()}
    manifest = {key: value for key, value in json.loads(read_header(file).manifest).items() if key != "canary"}
    data: bytes = save(shrunk, {METADATA_KEY: json.dumps(manifest)})
    return data


def main(address: str | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=address, help="The server's address; default: PROMPTMUX_URL, or loopback.")
    with Client(parser.parse_args([] if address else None).url) as client:

        def ask(served: PromptVersion) -> str:
            answer = client.predict(task=NAME, image=PICTURE)
            assert answer.prompt is not None
            print(f"{served}: answered by version {answer.prompt.version}: {answer.output}")
            return str(answer.output)

        file = client.prompts.pull("scene-caption")
        first = client.prompts.push(NAME, file, create_only=True)
        good = ask(first)
        second = client.prompts.push(NAME, weaker(file), if_version=first.version)
        ask(second)
        again = ask(client.prompts.rollback(NAME, if_version=second.version))
        client.prompts.delete(NAME)
    return int(again != good)


if __name__ == "__main__":
    sys.exit(main())
