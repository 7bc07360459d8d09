"""One picture, many tasks in one request, then a caption word by word: `promptmux serve`, then run this.

Everything here is the client's public interface.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from promptmux import Client, Item

PICTURE = Path(__file__).parent / "scene-01.png"


def main(address: str | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=address, help="The server's address; default: PROMPTMUX_URL, or loopback.")
    with Client(parser.parse_args([] if address else None).url) as client:
        asked = ["scene-caption", "scene-entailment", Item(task="scene-vqa", text="how many cats are there?")]
        # The text at the top goes to the tasks that take one: the caption takes none, the question brings its own.
        answers = client.fanout(PICTURE, asked, text="there is a cat")
        for answer in answers:
            print(f"{answer.task}: {answer.output or answer.error}")
        print("word by word: ", end="")
        for event in client.stream(task="scene-caption", image=PICTURE, beam_size=1):
            print(getattr(event, "text", "\n"), end="", flush=True)
    return int(any(answer.error for answer in answers))


if __name__ == "__main__":
    sys.exit(main())
