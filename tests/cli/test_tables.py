"""Tables show what others wrote, and do not obey it."""

from __future__ import annotations

import pytest

from promptmux_server.cli.output import print_table


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("[/unopened]", "[/unopened]"),
        (":warning:", ":warning:"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\rb", r"a\rb"),
        ("größe 図", "größe 図"),
    ],
    ids=["markup", "broken markup", "emoji", "escape", "return", "letters"],
)
def test_a_cell_neither_styles_the_table_nor_steers_the_terminal(
    cell: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(("column",), [(cell,)])
    assert shown in capsys.readouterr().out
