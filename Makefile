# Everything a person does with a clone. Needs Python 3.11 to 3.13, make and a C/C++ compiler; brings in the rest.

SHELL := /bin/sh
VENV  := .venv
BIN   := $(VENV)/bin
# The first Python that really runs and is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo "$$p" && break; \
	done)
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct-GGUF
FLOOR ?= 0
INPUTS ?= 100000
SEEDS ?= 2000
UP    ?= --local --place $(MODEL) --greet

.DEFAULT_GOAL := help
.PHONY: help up setup dev test test-engine test-failover test-faults test-mesh test-vulkan lint format coverage fuzz lock clean python simulate simulate-mutants

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: setup ## set up, start a node on this machine, let the model answer once, go on serving (Ctrl-C ends it)
	@exec $(BIN)/skulk up $(UP)

setup: python ## set up what running needs, in .venv
	@$(PYTHON) tools/setup_env.py --extra demo

dev: python ## set up what developing needs, in .venv
	@$(PYTHON) tools/setup_env.py --extra demo --extra dev

test: dev ## run every test suite (SUITES="unit contract" chooses), each within its share of the time
	@$(BIN)/python tools/run_suites.py $(SUITES)

test-mesh: dev ## nodes as hosts of their own, with mDNS between them (Linux, as root; skipped elsewhere)
	$(BIN)/python -m pytest -q -rs tests/mesh

test-vulkan: ## run the Vulkan build of llama.cpp on a driver that needs no GPU (the first time compiles 10 minutes)
	@$(PYTHON) tools/setup_vulkan.py
	@. build/vulkan/env.sh && exec build/vulkan/venv/bin/python -m pytest -q -p no:xdist tests/vulkan

test-engine: dev ## compare the engine's answers with and without reuse on the whole model (minutes; no part of `test`)
	@$(BIN)/python -m pytest -q tests/exhaustive/test_engine_whole.py

test-failover: dev ## kill a runner, and a node, at every token of an answer, real model included (half an hour; no part of `test`)
	@$(BIN)/python -m pytest -q tests/exhaustive/test_failover_whole.py

test-faults: dev ## whole nodes through a standstill, crash loops, a restart of all, split networks (minutes; as root; no part of `test`)
	@$(BIN)/python -m pytest -q -rs tests/exhaustive/test_cluster_whole.py tests/mesh

lint: dev ## check style, format, types, imports and tidiness
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --project pyproject.toml --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/tidy

format: dev ## put the code into the house's form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

coverage: dev ## run every suite, print which branches no test takes (FLOOR=70 fails below that)
	@$(BIN)/coverage erase
	@$(BIN)/python tools/run_suites.py --coverage $(SUITES)
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report --fail-under=$(FLOOR)

fuzz: dev ## feed the reader of GGUF headers with 100,000 hostile files (INPUTS=... changes that)
	@$(BIN)/python tools/fuzz_gguf.py --inputs $(INPUTS)

simulate: dev ## run the control plane through SEEDS=2000 seeded stories of faults, on all cores
	@$(BIN)/python tools/simulate.py --seeds $(SEEDS)

simulate-mutants: dev ## switch each rule of the control plane off: every one must make some seed fail
	@$(BIN)/python tools/simulate.py --mutants

lock: dev ## resolve the dependencies anew into requirements.lock
	$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
		--all-extras --group llama-cpp --custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

clean: ## remove what was built and measured (.venv and the compiled engine stay)
	rm -rf build dist *.egg-info .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find skulk tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@test -n "$(PYTHON)" || { echo "Skulk needs Python 3.11, 3.12 or 3.13 and found none. Install one:" \
		"'sudo apt install python3 python3-venv' (Debian 12 or newer, Ubuntu 24.04)," \
		"'sudo dnf install python3.13' (Fedora), 'brew install python@3.13' (macOS)." >&2; exit 1; }
