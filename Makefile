# finerank: `make quickstart` tunes a model from nothing; `make test` runs every check. `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/sh

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
PIP_ARGS ?=
PYTEST_ARGS ?=
DATA ?= src/finerank/data/bundled/about_finerank.json
BENCH_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install quickstart test lint format lock bench race clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## create the virtual environment with the pinned packages

$(STAMP): requirements.lock pyproject.toml tools/make_venv.py
	@test -n "$(PYTHON)" || { echo "finerank needs Python 3.11 to 3.13: install python3 and run make again"; exit 1; }
	@$(PYTHON) tools/make_venv.py $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --no-build-isolation --editable .
	@touch $@

quickstart: install ## tune, evaluate, merge and compare the default model on the shipped rows
	@$(BIN)/finerank quickstart

# one thread a process: the tests' models are tiny, and threads that wait for each other cost more than they bring
test: install ## the whole test suite, then format, lint and types
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory lint

lint: install ## format, lint and types
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/mypy

format: install ## rewrite the code in the one format
	$(BIN)/ruff format src tests benchmarks tools
	$(BIN)/ruff check --fix src tests benchmarks tools

lock: install ## write requirements.lock from what the environment holds now
	$(BIN)/python tools/make_lock.py requirements.lock

bench: install ## has the tuning step become slower? (its ratio to a plain path, held against the stored one)
	$(BIN)/python benchmarks/guard.py $(BENCH_ARGS)

race: install ## time a tuning step beside PEFT with transformers' Trainer (DATA=rows.json)
	$(BIN)/python benchmarks/tune_step.py --data $(DATA) $(BENCH_ARGS)

clean: ## remove the environment and caches of this checkout
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist src/*.egg-info
