"""The process starts again once with the allocator's settings, unless they are somebody's choice already."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from promptmux_server.cli import machine


def test_the_allocator_is_set_once() -> None:
    environment = machine.tuned_environment({"PATH": "/bin"}, "glibc")
    assert environment == {"PATH": "/bin", "GLIBC_TUNABLES": machine.ALLOCATOR, machine.RESTARTED_VARIABLE: "1"}
    assert machine.tuned_environment(environment, "glibc") is None


def test_a_loader_that_hides_the_settings_causes_no_second_restart() -> None:
    environment = machine.tuned_environment({}, "glibc")
    assert environment is not None
    del environment["GLIBC_TUNABLES"]
    assert machine.tuned_environment(environment, "glibc") is None


@pytest.mark.parametrize("chosen", ["", "glibc.malloc.check=1"], ids=["opted-out", "chosen"])
def test_a_setting_of_the_users_own_stays(chosen: str) -> None:
    assert machine.tuned_environment({"GLIBC_TUNABLES": chosen}, "glibc") is None


def test_another_libc_is_left_alone() -> None:
    assert machine.tuned_environment({}, "musl") is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_process_restarts_with_its_own_arguments() -> None:
    code = (
        "import os, sys; from promptmux_server.cli.machine import restart_tuned; restart_tuned();"
        "print(os.environ['GLIBC_TUNABLES'][:21], sys.argv[1:])"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", machine.RESTARTED_VARIABLE)
    }
    found = subprocess.run(
        [sys.executable, "-c", code, "a b", "c"], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split(" ", 1) == ["glibc.malloc.hugetlb=", "['a b', 'c']\n"]


def test_cores_are_at_least_one_and_at_most_what_the_affinity_allows() -> None:
    assert 1 <= machine.usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("content", "cores"),
    [("150000 100000", 1), ("400000 100000", 4), ("50000 100000", 1), ("max 100000", sys.maxsize)],
    ids=["one-and-a-half", "four", "half", "none"],
)
def test_a_containers_quota_counts_whole_cores(content: str, cores: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert machine._quota(tmp_path / "cpu.max") == cores
