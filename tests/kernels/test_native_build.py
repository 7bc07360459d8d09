"""The compiled form is built safely, once, and its absence costs nothing but speed."""

from __future__ import annotations

import logging
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from promptmux_kernels import cpu, native
from promptmux_kernels.cpu_autograd import Attention
from promptmux_kernels.native import __main__ as command
from promptmux_kernels.native import build
from promptmux_kernels.native.build import BuildError


@pytest.fixture
def fresh() -> Iterator[None]:
    """Decide anew whether there is a compiled form, and forget the decision afterwards."""
    for decision in (native.library_loaded, cpu.available):
        decision.cache_clear()
    yield
    for decision in (native.library_loaded, cpu.available):
        decision.cache_clear()


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "library_name", lambda level: f"{level}.so")
    return tmp_path / "promptmux" / "kernels"


def fake_compiler(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> list[str]:
    built: list[str] = []

    def compile_slowly(level: str, target: Path) -> None:
        built.append(level)
        target.write_bytes(b"half")
        time.sleep(seconds)
        target.write_bytes(b"whole")

    monkeypatch.setattr(build, "_compile", compile_slowly)
    return built


def test_without_a_compiler_plain_pytorch_serves_and_one_line_says_so(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(native, "capability", lambda: "avx2")
    with caplog.at_level(logging.WARNING):
        assert not cpu.available(torch.float32)
        assert not cpu.available(torch.bfloat16)
    assert [record.getMessage() for record in caplog.records] == [
        "CPU kernels: there is no C++ compiler (c++ or g++) on the path; plain PyTorch is used instead"
    ]


def test_a_failing_compiler_is_named(nothing_built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho 'cc1plus: fatal error: no' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(script))
    with pytest.raises(BuildError, match="cc1plus: fatal error: no"):
        build.find_or_build("avx2")
    assert list(nothing_built.iterdir()) == []


def test_without_avx2_nothing_is_built(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "capability", lambda: None)
    assert not cpu.available(torch.float32)
    assert "no AVX2" in caplog.text
    assert not nothing_built.exists()


@pytest.mark.parametrize(
    ("torch_uses", "cpu_has", "level"),
    [
        ("AVX512", {"avx512_bf16": True}, "avx512_bf16"),
        ("AVX512", {"avx512_bf16": False}, "avx512"),
        ("AVX2", {"avx2": True, "fma3": True, "avx512_bf16": True}, "avx2"),
        ("DEFAULT", {"avx2": False}, None),
    ],
    ids=["bfloat16", "avx-512", "avx-512-turned-off", "neither"],
)
def test_the_level_follows_the_cpu_and_torch(
    torch_uses: str, cpu_has: dict[str, bool], level: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torch_uses)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu_has)
    assert build.capability() == level


def test_a_library_that_disagrees_with_the_reference_is_not_used(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "library_loaded", lambda: True)
    for error in (1e-2, float("nan")):
        cpu.available.cache_clear()
        monkeypatch.setattr(cpu, "_self_test", lambda dtype, error=error: error)
        assert not cpu.available(torch.float32)
    assert "is off by 1.0e-02 in the self test" in caplog.text


@pytest.mark.skipif(not cpu.available(torch.float32), reason="no compiler, or no AVX2")
@pytest.mark.parametrize("wrong", [1e-2, float("nan")])
@pytest.mark.parametrize("of", range(5), ids=["q", "k", "v", "prompt-key", "prompt-value"])
def test_a_library_whose_gradients_disagree_is_not_used(
    fresh: None, monkeypatch: pytest.MonkeyPatch, of: int, wrong: float
) -> None:
    assert cpu.available(torch.float32)
    real = Attention.backward

    def spoil(*arguments: Any) -> list[torch.Tensor]:
        found = real(*arguments)
        found[of].flatten()[-1] += wrong
        return found

    monkeypatch.setattr(Attention, "backward", spoil)
    cpu.available.cache_clear()
    assert not cpu.available(torch.float32)


def test_an_unsupported_instruction_is_no_crash(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(dtype: torch.dtype) -> float:
        raise RuntimeError("brgemm: bf16 needs more")

    monkeypatch.setattr(cpu, "library_loaded", lambda: True)
    monkeypatch.setattr(cpu, "_self_test", refuse)
    assert not cpu.available(torch.bfloat16)
    assert "brgemm: bf16 needs more" in caplog.text


def test_a_cached_library_is_not_built_again(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = fake_compiler(monkeypatch)
    assert build.find_or_build("avx2") == build.find_or_build("avx2")
    assert built == ["avx2"]
    assert stat.S_IMODE(nothing_built.stat().st_mode) == 0o700


def test_racing_builders_never_show_half_a_library(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(monkeypatch, seconds=0.05)
    seen: list[bytes] = []
    racers = [threading.Thread(target=lambda: seen.append(build.find_or_build("avx2").read_bytes())) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert seen == [b"whole"] * 4
    assert [path.name for path in nothing_built.iterdir()] == ["avx2.so"]


@pytest.mark.parametrize("mode", [0o777, 0o770], ids=["everyone", "the-group"])
def test_a_directory_that_others_can_write_is_refused(
    mode: int, nothing_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = fake_compiler(monkeypatch)
    nothing_built.mkdir(parents=True)
    nothing_built.chmod(mode)
    with pytest.raises(BuildError, match="can be written by others"):
        build.find_or_build("avx2")
    assert built == []


def test_a_library_that_others_can_write_is_not_loaded(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(monkeypatch)
    build.find_or_build("avx2").chmod(0o666)
    with pytest.raises(BuildError, match="can be written by others"):
        build.find_or_build("avx2")


def test_a_shipped_library_is_preferred(nothing_built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = fake_compiler(monkeypatch)
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "built")
    build.ship()
    assert build.find_or_build("avx2") == tmp_path / "built" / "avx2.so"
    assert built == list(build.FLAGS)


def test_shipped_libraries_are_for_every_user_to_read(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_compiler(monkeypatch)
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "built")
    for path in (tmp_path / "built", *build.ship()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_a_shipped_directory_that_may_not_be_entered_is_passed_over(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(directory: Path, name: str = "") -> bool:
        if directory == tmp_path / "built":
            raise PermissionError(13, "Permission denied")
        return True

    fake_compiler(monkeypatch)
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "built")
    monkeypatch.setattr(build, "is_safe", refuse)
    assert build.find_or_build("avx2") == nothing_built / "avx2.so"


def test_a_cache_that_cannot_be_written_is_a_build_error(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="nothing can be kept in"):
        build.find_or_build("avx2")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", nowhere)
    with pytest.raises(BuildError, match="set XDG_CACHE_HOME"):
        build.cache_directory()


def test_the_name_changes_with_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "library.cpp").write_text("int a;")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    before = build.library_name("avx2")
    (tmp_path / "library.cpp").write_text("int b;")
    assert build.library_name("avx2") != before != build.library_name("avx512")


def test_the_command_builds_ahead_of_time_and_ships_every_level(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = fake_compiler(monkeypatch)
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "built")
    monkeypatch.setattr(command, "capability", lambda: "avx2")
    monkeypatch.setattr(command.platform, "machine", lambda: "x86_64")
    assert command.main([]) == 0
    assert command.main(["--ship"]) == 0
    assert built == ["avx2", *build.FLAGS]
    assert len(list((tmp_path / "built").iterdir())) == len(build.FLAGS)
    assert "avx512_bf16.so" in capsys.readouterr().out


def test_another_architecture_ships_nothing_and_says_so(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = fake_compiler(monkeypatch)
    monkeypatch.setattr(command.platform, "machine", lambda: "aarch64")
    assert command.main(["--ship"]) == 0
    assert built == []
    assert "x86-64" in capsys.readouterr().out
