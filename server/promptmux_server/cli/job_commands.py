"""`promptmux worker` and `promptmux jobs`: training that is left to a process of its own, and what became of it."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promptmux_server.cli.output import DEFAULT_URL, JsonOption, UrlOption, fail, print_json, print_table
from promptmux_server.cli.signals import asked_to_stop

if TYPE_CHECKING:
    from promptmux_server.jobs import JobTable

StateOption = Annotated[
    Path, typer.Option("--state", help="Directory of what the server keeps.", envvar="PROMPTMUX_STATE")
]
DEFAULT_STATE = Path("var/state")
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Of the job.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `promptmux worker --push --url http://127.0.0.1:8000`")(worker)
    jobs = typer.Typer(name="jobs", help="See and end what workers do.", no_args_is_help=True)
    app.add_typer(jobs)
    jobs.command("list", epilog="Example: promptmux jobs list --json")(list_all)
    jobs.command(epilog="Example: promptmux jobs show 3f0c1a")(show)
    jobs.command(epilog="Example: promptmux jobs cancel 3f0c1a")(cancel)


def job_table(state: Path) -> JobTable:
    """The table in a state directory; it is made if it is not there."""
    import sqlite3

    from promptmux_server.jobs import FILE, JobTable

    try:
        return JobTable(state / FILE)
    except (OSError, sqlite3.Error) as error:
        fail(f"the table of jobs cannot be opened: {error}")


def worker(
    once: Annotated[bool, typer.Option("--once", help="End when no job waits.")] = False,
    push: Annotated[
        bool,
        typer.Option(
            "--push", help="Publish the prompts whose jobs ask for it, if they are better than what is served."
        ),
    ] = False,
    state: StateOption = DEFAULT_STATE,
    url: UrlOption = DEFAULT_URL,
) -> None:
    """Run queued trainings, one after another. Ctrl-C keeps a checkpoint and gives the job back.

    With --push it needs a key of scope `admin` in PROMPTMUX_API_KEY, where the server asks for one.
    """
    from promptmux_server.cli.working import work

    with asked_to_stop() as stop:
        taken = work(job_table(state), stop, once=once, url=url if push else None)
    typer.echo(f"jobs taken: {taken}")


def list_all(state: StateOption = DEFAULT_STATE, as_json: JsonOption = False) -> None:
    """List the youngest jobs."""
    jobs = job_table(state).newest(50)
    if as_json:
        print_json([asdict(job) for job in jobs])
        return
    rows = [
        (j.id, str(j.payload.get("task") or j.payload.get("name", "")), j.state, str(j.attempts), _time(j.created))
        for j in jobs
    ]
    print_table(("id", "job", "state", "attempts", "asked for"), rows)


def show(job_id: IdArgument, state: StateOption = DEFAULT_STATE, as_json: JsonOption = False) -> None:
    """Show a job and what it has told."""
    from promptmux_server.errors import JobNotFound

    table = job_table(state)
    try:
        job, events = table.get(job_id), table.events(job_id)
    except JobNotFound as error:
        fail(error.message)
    if as_json:
        print_json({**asdict(job), "events": [asdict(event) for event in events]})
        return
    typer.echo(f"{job.id}: {job.state}, attempt {job.attempts} of {job.max_attempts}")
    rows = [(_time(e.at), e.name, ", ".join(f"{key} {value}" for key, value in e.data.items())) for e in events[-20:]]
    print_table(("at", "event", ""), rows)


def cancel(job_id: IdArgument, state: StateOption = DEFAULT_STATE) -> None:
    """End a job: at once if it waits, behind its step if it runs."""
    from promptmux_server.errors import JobNotFound

    try:
        job = job_table(state).cancel(job_id)
    except JobNotFound as error:
        fail(error.message)
    typer.echo(f"{job.id}: {'its worker is asked to end it' if job.state == 'running' else job.state}")


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
