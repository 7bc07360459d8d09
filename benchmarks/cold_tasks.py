"""1,000 tasks with room for 64 on the device, against all of them there; and how long a cold task's prompt takes.

Tasks are asked as Zipf's law has it (the n-th most asked 1/n as often as the first). Target: 0.90 of the throughput;
a cold prompt there within 20 ms in 99 of 100 cases, from a file that the system still has in memory.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from engines import PROMPT_LENGTH, Bench, answer_all, arguments, bench, report, side_by_side
from load import percentile
from promptmux_kernels import PAGE
from promptmux_prompts import Seed
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.prompt_copies import PromptCopies
from promptmux_server.engine.prompt_files import PromptFiles
from promptmux_server.engine.prompt_loader import PromptLoader
from promptmux_server.engine.prompt_table import PromptPools, pool_bytes
from promptmux_server.engine.prompt_tiers import PromptTiers, Tier

RESIDENT = 64
TASKS = {"pocket": 1000}
FEWER_TASKS = 300
"""On an OFA size: a prompt of OFA-base takes 4.7 MB in float32, a thousand of them would fill 5 GB of disk."""
EXPONENT = 1.0


def room(made: Bench, prompts: int) -> int:
    """Bytes of a device pool for so many prompts."""
    return pool_bytes(made.model.config, made.model.dtype, prompts * -(-PROMPT_LENGTH // PAGE))


def make_resident(engine: Engine, tasks: int) -> None:
    for task in range(tasks):
        engine.prompts.set_pinned(f"t{task}", True, author="local")
    while engine.load().prompts.resident < tasks:
        time.sleep(0.05)


def cold_waits_ms(made: Bench, tasks: int, tier: Tier) -> list[float]:
    """Milliseconds from each task's claim until its pages can be read, while nothing else happens.

    Every prompt is in `tier` beforehand and the device is full: one that comes sends another away.
    """
    model = made.model
    files = PromptFiles.of(model.config, made.fingerprint, model.dtype)
    pools = PromptPools(model.config, model.dtype, model.device, room(made, RESIDENT))
    copies = PromptCopies(pools)
    tiers = PromptTiers(pools, copies, host_bytes=room(made, tasks) if tier == "host" else 0)
    digests, news = [], threading.Event()
    for seed in files.seeds(made.prompts):
        assert isinstance(seed, Seed)
        said, path = seed.prompt.manifest, made.prompts / f"{seed.name}.safetensors"
        tiers.register(files.source(seed.prompt.digest, path, said.encoder_length, said.decoder_length), seed.prompt)
        digests.append(seed.prompt.digest)
    assert {place.tier for place in tiers.places().values()} == {tier}
    loader = PromptLoader(tiers, copies, files.read, news.set)
    loader.start()
    waits = []
    for digest in digests:
        started = time.perf_counter()
        lease = tiers.prefetch(digest)
        while tiers.hold(lease) is None:
            news.wait()
            news.clear()
        waits.append(1000 * (time.perf_counter() - started))
        tiers.release(lease)
    loader.close()
    return waits[RESIDENT:]


def main() -> None:
    options = arguments(__doc__, rounds=3, requests=128)
    tasks = TASKS.get(options.backbone, FEWER_TASKS)
    odds = np.arange(1, tasks + 1) ** -EXPONENT
    with bench(options.backbone, tasks) as made:
        waits: dict[Tier, list[float]] = {tier: cold_waits_ms(made, tasks, tier) for tier in ("disk", "host")}
        with (
            made.engine(prompt_device_bytes=room(made, RESIDENT)) as tiered,
            made.engine(prompt_device_bytes=room(made, tasks + 1)) as resident,
        ):
            make_resident(resident, tasks)
            pictures = [made.picture(i) for i in range(options.requests)]

            def ask(engine: Engine, draw: np.random.Generator) -> None:
                chosen = draw.choice(tasks, options.requests, p=odds / odds.sum()).tolist()
                answer_all(
                    engine, [made.request(task, picture) for task, picture in zip(chosen, pictures, strict=True)]
                )

            # Two streams of one seed: round by round both are asked the same, and never the same twice.
            first, second = np.random.default_rng(0), np.random.default_rng(0)
            ways = {"tiered": lambda: ask(tiered, first), "resident": lambda: ask(resident, second)}
            seconds = side_by_side(ways, options.rounds)
            loads = tiered.load().prompts.loads
        report(
            "cold_tasks",
            options.backbone,
            tasks=tasks,
            on_device=RESIDENT,
            requests_per_s=options.requests / seconds["tiered"],
            of_all_resident=seconds["resident"] / seconds["tiered"],
            loads_per_request=loads / (options.requests * (1 + options.rounds)),
            cold_from_disk_p50_ms=percentile(waits["disk"], 50),
            cold_from_disk_p99_ms=percentile(waits["disk"], 99),
            cold_from_host_p50_ms=percentile(waits["host"], 50),
            cold_from_host_p99_ms=percentile(waits["host"], 99),
        )


if __name__ == "__main__":
    main()
