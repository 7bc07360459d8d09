"""Prompt tiers without an engine: a disk that is a dictionary, a stepped loader, and accounts that must agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

import tiny
from promptmux_prompts import Prompt, PromptDigestMismatch
from promptmux_server.engine.prompt_copies import PromptCopies
from promptmux_server.engine.prompt_host import prompt_bytes
from promptmux_server.engine.prompt_loader import PromptLoader
from promptmux_server.engine.prompt_table import PromptPools, Residence, pool_bytes
from promptmux_server.engine.prompt_tiers import PromptTiers
from promptmux_server.engine.prompt_versions import Lease, PromptSource


@cache
def prompt(name: str, revision: int = 0, encoder_length: int = 20, decoder_length: int = 20) -> Prompt:
    seed = sum(map(ord, name)) * 100 + revision
    return tiny.prompt(name, seed=seed, encoder_length=encoder_length, decoder_length=decoder_length)


def source(of: Prompt) -> PromptSource:
    return PromptSource(
        of.digest, Path(of.manifest.name), of.encoder_key.shape[2], of.decoder_key.shape[2], prompt_bytes(of)
    )


class Bench:
    """Tiers of so many pages a side, their files, and what each digest must read as."""

    def __init__(self, pages: int, host_prompts: float = 0, on_change: Callable[[], None] = lambda: None) -> None:
        config = tiny.config()
        self.disk: dict[str, Prompt] = {}
        self.known: dict[str, Prompt] = {}
        self.reads = 0
        self.pools = PromptPools(config, torch.float32, torch.device("cpu"), pool_bytes(config, torch.float32, pages))
        copies = PromptCopies(self.pools)
        self.tiers = PromptTiers(self.pools, copies, int(host_prompts * prompt_bytes(prompt("x"))))
        self.loader = PromptLoader(self.tiers, copies, self.read, on_change)

    def read(self, wanted: PromptSource) -> Prompt:
        self.reads += 1
        found = self.disk.get(wanted.path.name)
        if found is None:
            raise FileNotFoundError(wanted.path.name)
        if found.digest != wanted.digest:
            raise PromptDigestMismatch("another version")
        return found

    def serve(self, *prompts: Prompt, seeded: bool = False) -> None:
        for item in prompts:
            self.disk[item.manifest.name] = item
            self.known[item.digest] = item
            self.tiers.register(source(item), item if seeded else None)

    def settle(self) -> None:
        """Let the loader do all it can; it must come to an end."""
        for _ in range(10_000):
            if not self.loader.step():
                return
        raise AssertionError("the loader does not come to rest")

    def fetch(self, item: Prompt) -> Residence | None:
        """Claim, load and hold a version; the claim is left to whoever counts pages."""
        lease = self.tiers.prefetch(item.digest)
        self.settle()
        return self.tiers.hold(lease)

    def reads_as(self, home: Residence, digest: str) -> bool:
        """Whether pages hold exactly a version's numbers, and zeros behind them."""
        expected = self.known[digest]
        sides = (
            (self.pools.encoder, home.encoder_pages, expected.encoder_key, expected.encoder_value),
            (self.pools.decoder, home.decoder_pages, expected.decoder_key, expected.decoder_value),
        )
        for pool, pages, *parts in sides:
            for stored, part in zip((pool.key, pool.value), parts, strict=True):
                joined = stored[:, list(pages)].transpose(1, 2).flatten(2, 3)  # (L, H, n * PAGE, D)
                length = part.shape[2]
                if not torch.equal(joined[:, :, :length], part) or bool(joined[:, :, length:].any()):
                    return False
        return True

    def check(self, leases: list[Lease]) -> None:
        """Every account, between two steps: `leases` are all that have not been released."""
        tiers = self.tiers
        homes = [version.home for version in tiers._resident]
        assert all(homes)
        for side in ("encoder", "decoder"):
            pool = getattr(self.pools, side)
            taken = [page for home in (*homes, *tiers._dirty) for page in getattr(home, f"{side}_pages")]
            assert sorted(taken + pool._free) == list(range(1, pool.total + 1)), "a page is lost or has two owners"
            assert pool.used == len(taken)
            empty = [0, *pool._free]
            assert not pool.key[:, empty].any(), "a free page is not zero"
            assert not pool.value[:, empty].any(), "a free page is not zero"
        stats = tiers.stats()
        taken_bytes = sum(
            len(getattr(home, f"{side}_pages")) * getattr(self.pools, side).page_bytes
            for home in (*homes, *tiers._dirty)
            for side in ("encoder", "decoder")
        )
        assert stats.device_bytes == taken_bytes <= stats.device_budget_bytes
        assert stats.host_bytes == sum(map(prompt_bytes, tiers._host._copies.values())) <= stats.host_budget_bytes
        for version in tiers._versions.values():
            own = [lease for lease in leases if lease.version is version]
            assert version.held == sum(lease.residence is not None for lease in own), "a hold is lost"
            waiting = {number for number, lease in version.waiting.items() if lease is not None}
            assert waiting == {lease.number for lease in own if lease.residence is None and lease.error is None}
            assert version.served or version.in_use, "a version outlives its last request"
            assert bool(version.waiting) == (version in tiers._wanted)
        for version in tiers._resident:
            assert version.home is not None
            assert self.reads_as(version.home, version.source.digest), "pages hold another version's numbers"
