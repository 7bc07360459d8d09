# One command per habit. `make demo` and `make test` need Python 3.11 or newer, make and a package registry, nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SOURCES := kernels/promptmux_kernels prompts/promptmux_prompts server/promptmux_server clients/python/promptmux
CLAIMS := benchmarks/mixing.py benchmarks/cold_tasks.py benchmarks/fanout.py benchmarks/continuous.py benchmarks/deterministic.py benchmarks/overload.py benchmarks/http_overhead.py benchmarks/registry_scale.py
.PHONY: install format lint types test bench demo serve soak pocket art scenes pretrain task-files library

install: .venv/installed
.venv/installed: pyproject.toml clients/python/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv && $(BIN)/python -m pip install -q -c constraints.txt pip torch
	$(BIN)/python -m pip install -q -c constraints.txt --build-constraint constraints.txt -e clients/python -e '.[dev]'
	$(BIN)/python -m promptmux_kernels.native && touch $@

format: install
	$(BIN)/ruff check -q --fix . && $(BIN)/ruff format -q .

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_layout.py

types: install
	$(BIN)/mypy $(SOURCES)

test: install
	$(BIN)/python -m pytest -n 2

# Each benchmark prints a line of JSON, and appends it to the file BENCH_OUT if that is set.
bench: install
	set -e; for claim in $(CLAIMS); do $(BIN)/python $$claim; done
	$(BIN)/python benchmarks/publish.py --backbone ofa-base
	$(BIN)/python benchmarks/ofa_base_picture.py

demo: install
	$(BIN)/python examples/demo.py

serve: install
	$(BIN)/promptmux serve

soak: install
	$(BIN)/python -m pytest -n 2 -m soak

# How the embedded backbone and its prompts are made, in this order; only `art` needs npm. Hours, resumable (docs/pocket.md).
pocket: install art scenes pretrain task-files library

art:
	mkdir -p var/art && cd var/art && npm pack --silent @lobehub/fluent-emoji-3d@1.1.0 && tar xzf *fluent-emoji-3d*.tgz --strip-components=1

scenes: install
	$(BIN)/python -m promptmux_server.pocket.dataset --split train --shards 40 --shapes 0.2 --out var/pocket/train
	$(BIN)/python -m promptmux_server.pocket.dataset --split heldout --shards 4 --shapes 0.2 --out var/pocket/heldout

pretrain: install
	$(BIN)/python -m promptmux_server.pocket.vocabulary
	test -e var/pocket/stem.safetensors || $(BIN)/python -m promptmux_server.pocket.stem
	$(BIN)/torchrun --nproc-per-node 2 -m promptmux_server.pocket.pretrain --threads 1 && $(BIN)/python -m promptmux_server.pocket.export

task-files: install
	$(BIN)/python -m pip install -q -c constraints.txt easy-vqa
	$(BIN)/python -m promptmux_server.pocket.easy_vqa && $(BIN)/python -m promptmux_server.pocket.task_files

library: install
	$(BIN)/python -m promptmux_server.pocket.recipes
	ls prompts/recipes/*.toml | xargs -P 2 -n 1 $(BIN)/promptmux train
	$(BIN)/python -m promptmux_server.pocket.shipping && $(BIN)/python -m promptmux_server.pocket.curves
