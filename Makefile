# The whole developer interface. Each target sets up .venv by itself when needed; the second run is quick.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
BENCHMARKS := $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py))
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-slow lint format bench clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.core: pyproject.toml constraints.txt
	@echo "== setting up $(VENV): a few minutes the first time, about 2 GB on disk"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "== adding what tests and linters need"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.core ## raw text to an answering endpoint, in minutes, offline
	@$(BIN)/hearth demo $(DEMO_ARGS)

lint: $(VENV)/.dev ## ruff, mypy strict, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread a process: two test processes share the machine's cores.
test: lint ## the linters and the fast tests
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/.dev ## long integration and fault tests
	$(PYTEST) -m slow --durations=15

format: $(VENV)/.dev ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## every benchmark, one after another; minutes to an hour
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean: ## remove what the tools leave behind; keeps .venv and .hearth
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist build
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
