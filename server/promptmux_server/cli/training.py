"""`promptmux train`: one job from its configuration to a prompt file, and into a server if it is better.

A signal ends it behind the step under way, with a checkpoint; the same command goes on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptmux_server.cli.job_commands import DEFAULT_STATE, StateOption, job_table
from promptmux_server.cli.output import DEFAULT_URL, JsonOption, UrlOption, fail, print_json
from promptmux_server.cli.signals import asked_to_stop

if TYPE_CHECKING:
    from promptmux_prompts import Prompt
    from promptmux_server.cli.publish_gate import Verdict
    from promptmux_server.jobs import JobTable
    from promptmux_server.training.job import Job

STOPPED = 130
"""Exit status of a run that was asked to stop."""


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `promptmux train pets.toml --push`")(train)


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file (docs/training.md).", exists=True, dir_okay=False)],
    push: Annotated[
        bool, typer.Option("--push", help="Publish it into a running server if it is better than what is served.")
    ] = False,
    changed_recipe: Annotated[
        bool, typer.Option("--changed-recipe", help="Go on from a checkpoint whose [steps] were other ones.")
    ] = False,
    queue: Annotated[
        bool, typer.Option("--queue", help="Leave it to `promptmux worker`, and print the job's id.")
    ] = False,
    priority: Annotated[int, typer.Option(help="Of a queued job; higher ones are begun first.")] = 0,
    state: StateOption = DEFAULT_STATE,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Learn a prompt for a task from your own data, score it as it would be served, and write the prompt file.

    Ctrl-C keeps a checkpoint; the same command goes on from the last one.
    """
    import torch

    from promptmux_server.cli.machine import usable_cores
    from promptmux_server.cli.training_scores import keep_prompt, push_if_better, score_served
    from promptmux_server.errors import PromptmuxError
    from promptmux_server.pocket import WEIGHTS
    from promptmux_server.training.curve import write_durably
    from promptmux_server.training.job import Job
    from promptmux_server.training.job_config import read_job
    from promptmux_server.training.job_parts import open_backbone

    try:
        job_config, written = read_job(config)
        if queue:
            _queue(config, written, job_table(state), priority)
            return
        torch.set_num_threads(job_config.machine.threads or usable_cores())
        backbone = open_backbone(job_config, WEIGHTS)
        with Job(job_config, backbone, score_served) as job:
            begun = job.resume(changed_recipe=changed_recipe)
            write_durably(job_config.output / "config.toml", written)
            _run(job, begun)
            path, prompt = keep_prompt(job)
            verdict = push_if_better(job, prompt, url) if push else None
    except PromptmuxError as error:
        fail(error.message)
    _report(path, prompt, verdict, as_json=as_json)


def _queue(config: Path, written: bytes, table: JobTable, priority: int) -> None:
    """Leave a job that was checked to a worker on this machine, which finds its files where they are now."""
    payload = {"config": written.decode(), "name": config.name, "folder": str(config.resolve().parent)}
    typer.echo(table.submit("training", payload, priority=priority).id)


def _run(job: Job, begun: int) -> None:
    """Learn from step `begun` to the end, or leave the command where a signal came before."""
    from promptmux_server.cli.training_progress import showing
    from promptmux_server.training.job import Stopped

    name = job.config.task.name
    left_out = f", {job.data.skipped} lines left out" if job.data.skipped else ""
    typer.echo(
        f"{name}: {job.data.train.epoch_samples} samples to learn from, {len(job.questions)} to be scored on{left_out}"
        + (f"; goes on from step {begun}" if begun else ""),
        err=True,
    )
    stopped = False
    with asked_to_stop() as stop, showing(name, begun, job.config.steps.steps) as show:
        for event in job.events(stop):
            show(event)
            stopped = isinstance(event, Stopped)
    if stopped:
        typer.echo(f"stopped behind step {job.run.step}; the same command goes on from there", err=True)
        raise typer.Exit(STOPPED)


def _report(path: Path, prompt: Prompt, verdict: Verdict | None, *, as_json: bool) -> None:
    metric: Any = prompt.manifest.metric
    step = prompt.manifest.provenance["chosen_step"]
    if as_json:
        found = None if verdict is None else {**vars(verdict)}
        print_json({"file": str(path), "sha256": prompt.digest, "metric": metric, "step": step, "push": found})
        return
    typer.echo(f"{path}: {metric['name']} {metric['value']:.4f} on {metric['n']} held-out samples, step {step}")
    if verdict is not None:
        typer.echo(str(verdict))
