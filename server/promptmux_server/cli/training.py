"""`promptmux train`: one job from its configuration to a file of what it learned, and a prompt into a server.

A signal ends it behind the step under way, with a checkpoint; the same command goes on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promptmux_server.cli.job_commands import DEFAULT_STATE, StateOption, job_table
from promptmux_server.cli.output import DEFAULT_URL, JsonOption, UrlOption, fail, print_json
from promptmux_server.cli.signals import asked_to_stop

if TYPE_CHECKING:
    from promptmux_server.cli.publish_gate import Verdict
    from promptmux_server.cli.training_scores import Kept
    from promptmux_server.jobs import JobTable
    from promptmux_server.training.job import Job
    from promptmux_server.training.job_config import JobConfig
    from promptmux_server.training.ranks import Ranks
    from promptmux_server.training.validation import OpenBackbone

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
    changed_pictures: Annotated[
        bool, typer.Option("--changed-pictures", help="Go on from a checkpoint whose picture files were other ones.")
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

    With [method] it trains weights of the backbone instead, as a baseline to compare prompts with.

    Ctrl-C keeps a checkpoint; the same command goes on from the last one. Several processes share every batch:
    `torchrun --nproc-per-node 2 -m promptmux_server train pets.toml`.
    """
    import torch

    from promptmux_server.cli.publish_gate import push_if_better
    from promptmux_server.cli.published import published
    from promptmux_server.cli.ranks import ranks_here, refuse_torchrun, share_of_cores
    from promptmux_server.cli.training_scores import keep_learned, score_served
    from promptmux_server.errors import PromptmuxError
    from promptmux_server.pocket import WEIGHTS
    from promptmux_server.training.curve import write_durably
    from promptmux_server.training.job import Job, held
    from promptmux_server.training.job_config import kept_as, read_job
    from promptmux_server.training.job_parts import open_backbone

    try:
        job_config, written = read_job(config)
        if push and job_config.method.name != "prompt":
            fail(f"only prompts are published, and {job_config.method.name} trains weights: leave --push out.")
        if queue:
            refuse_torchrun("each would queue a job of its own")
            _queue(job_table(state), job_config, config, written, priority=priority, push=push)
            return
        torch.set_num_threads(job_config.machine.threads or share_of_cores())
        with ranks_here(job_config.machine) as ranks:
            if not ranks.leads:
                _follow(job_config, open_backbone(job_config, WEIGHTS), ranks)
                return
            with (
                held(job_config),
                Job(job_config, open_backbone(job_config, WEIGHTS), score_served, published, ranks) as job,
            ):
                begun = job.resume(changed_recipe=changed_recipe, changed_pictures=changed_pictures)
                write_durably(job_config.output / kept_as(config.name), written)
                _run(job, begun)
                kept = keep_learned(job)
                verdict = push_if_better(url, job, kept.learned) if push else None
    except PromptmuxError as error:
        fail(error.message)
    _report(kept, verdict, as_json=as_json)


def _follow(config: JobConfig, backbone: OpenBackbone, ranks: Ranks) -> None:
    """Learn beside the process that leads, or leave the command where a signal came before the end."""
    from promptmux_server.training.shared import follow

    with asked_to_stop() as stop:
        run = follow(config, backbone, ranks, stop)
    if not run.finished:
        raise typer.Exit(STOPPED)


def _queue(table: JobTable, job: JobConfig, config: Path, written: bytes, *, priority: int, push: bool) -> None:
    """Leave a job that was checked to a worker on this machine, which finds its files where they are now."""
    from promptmux_server.jobs.trainings import TrainingRequest, submit

    request = TrainingRequest(
        config=written.decode(),
        name=config.name,
        folder=str(config.resolve().parent),
        task=job.task.name,
        publish=push or job.asks_to_be_published,
    )
    typer.echo(submit(table, request, job.output, priority=priority).id)


def _run(job: Job, begun: int) -> None:
    """Learn from step `begun` to the end, or leave the command where a signal came before."""
    from promptmux_server.cli.training_progress import showing
    from promptmux_server.training.job import Stopped
    from promptmux_server.training.methods import trainable

    name, numbers = job.config.task.name, trainable(job.method)
    whole = sum(tensor.numel() for tensor in job.backbone.model.parameters())
    left_out = f", {job.data.skipped} lines left out" if job.data.skipped else ""
    typer.echo(
        f"{name}: {job.data.train.epoch_samples} samples to learn from, {len(job.exam.questions)} to be scored on"
        f"{left_out}; {job.config.method.name} trains {numbers:,} numbers ({numbers / whole:.2%} of the backbone)"
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


def _report(kept: Kept, verdict: Verdict | None, *, as_json: bool) -> None:
    told = kept.told()
    if as_json:
        print_json({**told, "push": None if verdict is None else {**vars(verdict)}})
        return
    metric = told["metric"]
    typer.echo(
        f"{kept.path}: {metric['name']} {metric['value']:.4f} on {metric['n']} held-out samples, step {told['step']}, "
        f"{told['trainable']:,} numbers trained"
    )
    if verdict is not None:
        typer.echo(str(verdict))
