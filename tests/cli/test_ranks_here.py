"""A process that `torchrun` started finds its place, takes its share of the machine, and leaves the group behind."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from typer.testing import CliRunner

from cli.tiny_training import prepare
from promptmux_server.cli import app
from promptmux_server.cli import ranks as ranks_module
from promptmux_server.cli.ranks import ranks_here, share_of_cores
from promptmux_server.errors import TrainingConfigError
from promptmux_server.jobs import JobTable
from promptmux_server.training.job_config import MachineConfig
from promptmux_server.training.loss import LossNumbers
from promptmux_server.training.ranks import ALONE


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun says to the only process of a run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, str(value))


CPU = MachineConfig(device="cpu", patience_s=5.0)


def test_without_torchrun_a_process_is_alone() -> None:
    with ranks_here(CPU) as ranks:
        assert ranks is ALONE


@pytest.mark.usefixtures("torchrun")
def test_a_group_of_one_says_what_one_alone_says() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    parameter.grad = torch.arange(6.0).view(2, 3)
    with ranks_here(CPU) as ranks:
        assert (ranks.number, ranks.count, ranks.leads) == (0, 1, True)
        assert ranks.add_losses(LossNumbers(1.5, 0.5, 3)) == LossNumbers(1.5, 0.5, 3)
        ranks.add_gradients([parameter])
        assert torch.equal(parameter.grad, torch.arange(6.0).view(2, 3))
        assert ranks.agree(True)
        assert not ranks.agree(False)
        assert ranks.hand_out(b"state") == b"state"
    assert not dist.is_initialized()


@pytest.mark.usefixtures("torchrun")
def test_too_few_gpus_are_an_error_with_a_way_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        pytest.raises(TrainingConfigError, match="there are 2 GPUs, and each process needs one: start fewer"),
        ranks_here(MachineConfig()),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "why"),
    [(["train", "--queue"], "each would queue a job of its own"), (["tune-search"], "a search learns in one process")],
)
@pytest.mark.usefixtures("torchrun")
def test_what_each_process_would_do_on_its_own_is_refused(tmp_path: Path, arguments: list[str], why: str) -> None:
    refused = CliRunner().invoke(app, [*arguments, str(prepare(tmp_path))])
    assert refused.exit_code == 1
    assert f"torchrun runs this command once for each process, and {why}: run it without." in refused.stderr
    assert list(tmp_path.glob("out")) == []


@pytest.mark.usefixtures("torchrun")
def test_under_torchrun_no_job_is_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", "--queue", str(prepare(tmp_path)), "--state", str(tmp_path / "state")]
    assert CliRunner().invoke(app, command).exit_code == 1
    assert not (tmp_path / "state").exists()
    monkeypatch.setattr(ranks_module, "refuse_torchrun", lambda _why: None)  # the control: nothing else refuses it
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(JobTable(tmp_path / "state" / "jobs.sqlite").newest(9)) == 1


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "usable_cores", lambda: 8)
    assert share_of_cores() == 8
    for processes, share in ((3, 2), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert share_of_cores() == share
