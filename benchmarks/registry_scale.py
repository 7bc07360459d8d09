"""10,000 registered prompts against the four shipped ones: start-up, pages of the lists, memory of the server.

The prompts are of the embedded backbone's size, written through the store without waiting for the disk. Targets: ready
within 10 s, a page of 100 within 50 ms, memory bounded by the configured tiers. Each start reads files that the system
still has in memory.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import httpx2
import torch

from engines import arguments, report
from load import percentile
from promptmux import Client
from promptmux_prompts import ImageInput, Manifest, Prompt, write_prompt
from promptmux_prompts.disk import Disk
from promptmux_prompts.store import Store
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.pocket import WEIGHTS
from serving import Served, serving

LENGTH = 32
PAGE = 100
PICTURE = Path(__file__).parents[1] / "examples" / "scene-01.png"
ASKED = 64
"""Prompts that answer a request each, far more than the device keeps."""


class HastyDisk(Disk):
    """Waits for nothing, and so would lose what it was told last if the power failed."""

    def sync(self, file: int) -> None:
        pass

    def sync_folder(self, place: str) -> None:
        pass


def fill(root: Path, prompts: int) -> None:
    """Publish so many prompts `p00000`, ... of random values."""
    backbone = load_backbone(WEIGHTS)
    config, draw = backbone.config, torch.Generator().manual_seed(0)
    layers = (config.encoder_layers, config.encoder_layers, config.decoder_layers, config.decoder_layers)
    root.mkdir(parents=True)
    store = Store.open(root, max_names=prompts, disk=HastyDisk(root))
    for number in range(prompts):
        manifest = Manifest(
            name=f"p{number:05}",
            kind="caption",
            backbone_name=config.name,
            fingerprint=backbone.fingerprint,
            encoder_length=LENGTH,
            decoder_length=LENGTH,
            instruction=" what does the image describe?",
            image=ImageInput(config.image_size),
        )
        sides = [torch.randn(n, config.heads, LENGTH, config.head_dim, generator=draw) * 0.02 for n in layers]
        prompt = Prompt.build(manifest, *sides)
        with store.upload() as upload:
            upload.write(write_prompt(prompt))
            store.publish(manifest.name, upload, prompt, author="local")


def page_ms(served: Served, route: str, member: str) -> list[float]:
    """Milliseconds of each page of a list, from the first to the last."""
    waits, after = [], None
    with httpx2.Client(base_url=served.address, trust_env=False, timeout=60) as http:
        while True:
            started = time.perf_counter()
            page = http.get(route, params={"limit": PAGE, **({"after": after} if after else {})}).raise_for_status()
            waits.append(1000 * (time.perf_counter() - started))
            found = page.json()
            assert len(found[member]) <= PAGE
            after = found["next"]
            if after is None:
                return waits


def ask(served: Served, prompts: int) -> None:
    """One request each of prompts from all over the registry."""
    with Client(served.address) as client:
        for number in range(0, prompts, max(1, prompts // ASKED)):
            client.predict(task=f"p{number:05}", image=PICTURE, beam_size=1, max_length=2)


def main() -> None:
    options = arguments(__doc__, prompts=10_000)
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder, "few"), Path(folder, "many")
        started = time.perf_counter()
        fill(many / "registry", options.prompts)
        filled_s = time.perf_counter() - started
        room = options.prompts + 100
        with serving(few, max_prompts=room):
            pass  # the first start of all reads everything from the disk
        with serving(few, max_prompts=room) as served:
            empty, empty_mb = served, served.resident_mb
        with serving(many, max_prompts=room) as served:
            started_mb = served.resident_mb
            versions, tasks = page_ms(served, "/v1/prompts", "prompts"), page_ms(served, "/v1/tasks", "tasks")
            listed_mb = served.resident_mb
            ask(served, options.prompts)
            asked_mb = served.resident_mb
        report(
            "registry_scale",
            options.backbone,
            prompts=options.prompts,
            filled_s=filled_s,
            start_s=served.start_s,
            start_of_few_s=empty.start_s,
            prompts_page_p50_ms=percentile(versions, 50),
            prompts_page_max_ms=max(versions),
            tasks_page_p50_ms=percentile(tasks, 50),
            tasks_page_max_ms=max(tasks),
            few_mb=empty_mb,
            started_mb=started_mb,
            listed_mb=listed_mb,
            asked_mb=asked_mb,
            kb_per_prompt=1000 * (listed_mb - empty_mb) / options.prompts,
        )


if __name__ == "__main__":
    main()
