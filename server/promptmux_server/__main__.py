"""`promptmux`: the only reader of argv and environment."""

from __future__ import annotations

from promptmux_server.cli import app


def main() -> None:
    app()


if __name__ == "__main__":
    main()
