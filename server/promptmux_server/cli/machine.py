"""What the process asks of the machine before torch is loaded: memory that stays mapped, as many threads as cores.

Knows nothing of models. Must import nothing heavy: glibc reads its settings once, when a process starts.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

ALLOCATOR = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,
        "mmap_threshold": 4 << 30,
        "trim_threshold": 8 << 30,
        "top_pad": 256 << 20,
        "arena_max": 1,
    }.items()
)
"""Keep freed memory for the next batch, in huge pages. By default every large tensor is mapped afresh and each of its
pages faults: 58 600 faults for 240 MB of temporaries, 31 with this. One arena, because the engine's thread would get
one that cannot grow (1364 faults)."""

ALLOCATOR_VARIABLE = "GLIBC_TUNABLES"

RESTARTED_VARIABLE = "_PROMPTMUX_RESTARTED"
"""Marks the process that was started again. A loader may take the settings out of the environment (glibc does, of a
privileged program); without this mark it would be started again for ever."""


def tuned_environment(environment: Mapping[str, str], libc: str) -> dict[str, str] | None:
    """The environment to start again with, or None if this process may go on as it is.

    A variable that is set, even to nothing, is the user's choice: `GLIBC_TUNABLES= promptmux serve` changes nothing.
    """
    if libc != "glibc" or ALLOCATOR_VARIABLE in environment or RESTARTED_VARIABLE in environment:
        return None
    return {**environment, ALLOCATOR_VARIABLE: ALLOCATOR, RESTARTED_VARIABLE: "1"}


def restart_tuned() -> None:
    """Replace this process by the same command with the allocator's settings, once, where that helps."""
    environment = tuned_environment(os.environ, platform.libc_ver()[0])
    if environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity, less hyperthreads, less a container's quota."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


def _siblings(cpu: int) -> str:
    """The hyperthreads of this CPU's core, as Linux lists them; the CPU itself where that is not known."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Whole CPUs of the control group's quota; a great many without one."""
    try:
        quota, period = limit.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return sys.maxsize
