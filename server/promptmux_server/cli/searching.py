"""`promptmux tune-search` and `tune-report`: many trials of one task to one prompt file, and what was seen on the way.

What a search needs beyond a server comes with the extra `train`, and is imported when a command runs.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promptmux_server.cli.output import DEFAULT_URL, JsonOption, UrlOption, fail, print_json, print_table
from promptmux_server.cli.signals import asked_to_stop
from promptmux_server.cli.training import STOPPED

if TYPE_CHECKING:
    from promptmux_server.cli.publish_gate import Verdict
    from promptmux_server.cli.training_scores import Kept
    from promptmux_server.training.job import Job
    from promptmux_server.training.search.report import Report
    from promptmux_server.training.search.search import Search

EXTRA = "train"
OPTIONAL = ("optuna", "matplotlib")
SHOWN = 5
"""Trials, of a table for people."""


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `promptmux tune-search pets-search.toml --push`")(tune_search)
    app.command(epilog="Example: `promptmux tune-report runs/pets-search`")(tune_report)


def tune_search(
    config: Annotated[Path, typer.Argument(help="A TOML file (docs/search.md).", exists=True, dir_okay=False)],
    push: Annotated[
        bool, typer.Option("--push", help="Publish the best prompt if it is better than what is served.")
    ] = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Search for the learning rate, lengths and more of a prompt: many trials learn in one batch, the worse ones end.

    Writes the best trial's prompt file, a report and plots. Ctrl-C keeps all; the same command goes on from there.
    """
    from promptmux_server.errors import PromptmuxError

    try:
        _check_extra()
        _search(config, url if push else None, as_json=as_json)
    except PromptmuxError as error:
        fail(error.message)


def tune_report(
    folder: Annotated[Path, typer.Argument(help="The `output` of a search.", exists=True, file_okay=False)],
    as_json: JsonOption = False,
) -> None:
    """Write a search's report and plots again, from its journal alone; it may still be running."""
    from promptmux_server.errors import PromptmuxError

    try:
        _check_extra()
        report = _write(folder)
    except PromptmuxError as error:
        fail(error.message)
    if as_json:
        print_json(asdict(report))
        return
    _print_trials(report)
    typer.echo(f"{folder / 'report.json'}, and plots beside it")


def _check_extra() -> None:
    """Raises ExtraMissing, before anything is imported."""
    from promptmux_server.errors import ExtraMissing

    for package in OPTIONAL:
        if find_spec(package) is None:
            raise ExtraMissing(EXTRA, package)


def _search(path: Path, url: str | None, *, as_json: bool) -> None:
    """From a configuration to a prompt file, published at `url` if there is one; raises PromptmuxError."""
    import torch

    from promptmux_server.cli.machine import usable_cores
    from promptmux_server.cli.publish_gate import push_if_better
    from promptmux_server.cli.published import published
    from promptmux_server.cli.ranks import refuse_torchrun
    from promptmux_server.cli.training_scores import score_served
    from promptmux_server.pocket import WEIGHTS
    from promptmux_server.training.curve import write_durably
    from promptmux_server.training.job_config import kept_as
    from promptmux_server.training.job_parts import open_backbone
    from promptmux_server.training.search.config import read_search
    from promptmux_server.training.search.search import Search

    refuse_torchrun("a search learns in one process")
    config, written = read_search(path)
    torch.set_num_threads(config.machine.threads or usable_cores())
    with Search(config, open_backbone(config, WEIGHTS), score_served, published) as search:
        write_durably(config.output / kept_as(path.name), written)
        if not _run(search):
            _write(config.output)
            typer.echo("stopped; the same command goes on from there", err=True)
            raise typer.Exit(STOPPED)
        job, kept = _keep_best(search)
        report = _write(config.output)
        verdict = push_if_better(url, job, kept.learned) if url else None
    _tell(report, kept, verdict, as_json=as_json)


def _run(search: Search) -> bool:
    """Whether the search came to its end; else a signal came before."""
    from promptmux_server.cli.search_progress import showing
    from promptmux_server.training.search.search import Stopped

    with asked_to_stop() as stop, showing(search) as show:
        for event in search.events(stop):
            show(event)
            if isinstance(event, Stopped):
                return False
    return True


def _keep_best(search: Search) -> tuple[Job, Kept]:
    """Write the best trial's prompt, with what it was chosen from."""
    from promptmux_server.cli.training_scores import keep_learned
    from promptmux_server.training.search.record import best_of

    trials = search.trials()
    best = best_of(trials)
    assert best is not None, "a search at its end has a trial that is complete"
    origin = {"trial": best.number, "trials": len(trials), "values": dict(best.values)}
    job = search.job_of(best)
    job.resume()
    return job, keep_learned(job, search.config.output, search=origin)


def _write(folder: Path) -> Report:
    from promptmux_server.training.search.plots import draw
    from promptmux_server.training.search.report import read_report, write_report

    report = read_report(folder)
    write_report(report, folder)
    draw(report, folder)
    return report


def _tell(report: Report, kept: Kept, verdict: Verdict | None, *, as_json: bool) -> None:
    best = report.best
    assert best is not None
    if as_json:
        found = None if verdict is None else vars(verdict)
        print_json(
            {
                **kept.told(),
                "push": found,
                "trials": len(report.trials),
                "best": asdict(best),
                "importances": report.importances,
            }
        )
        return
    _print_trials(report)
    typer.echo(f"{kept.path}: trial {best.number}, {report.about['metric']} {best.score:.4f}")
    typer.echo(f"{kept.path.parent / 'report.json'}, and plots beside it")
    typer.echo(str(verdict) if verdict else f"publish it with: promptmux prompts push {kept.path}")


def _print_trials(report: Report) -> None:
    """The best trials, and what mattered."""
    ranked = sorted(report.trials, key=lambda trial: (trial.state != "complete", -(trial.score or 0.0)))[:SHOWN]
    fields = list(report.about["space"])
    rows = [
        (
            str(trial.number),
            trial.state,
            "-" if trial.score is None else f"{trial.score:.4f}",
            *(_short(trial.values.get(field, "")) for field in fields),
        )
        for trial in ranked
    ]
    print_table(("trial", "state", str(report.about["metric"]), *fields), rows)
    if report.importances:
        shares = ", ".join(f"{field} {share:.0%}" for field, share in report.importances.items())
        typer.echo(f"what mattered: {shares}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
