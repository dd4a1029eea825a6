# SPDX-License-Identifier: Apache-2.0
# Needs Python 3.11+ with venv, make, and a way to the Python package index. The workflow and pre-commit call these same targets.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Named data and weights: what the user set (else data/ of the checkout), then ../shared/data where it exists.
SHARED := $(realpath ../shared/data)
export VTJAX_DATA := $(or $(VTJAX_DATA),$(CURDIR)/data)$(if $(SHARED),:$(SHARED))

# XLA allocates the temporary memory of a step anew each time; huge pages save a quarter of a CPU training step in page
# faults (experiments/vit/README.md). Linux with glibc only, ignored elsewhere.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow lint format notebooks docs

help:
	@echo "make demo       train a small ViT on real handwritten digits, evaluate it, draw it (minutes; FRESH=1: once more)"
	@echo "make test       linters, type checker and the tests (minutes)"
	@echo "make test-slow  the long and statistical tests"
	@echo "make lint       ruff (rules and format) and mypy"
	@echo "make format     let ruff fix and format"
	@echo "make notebooks  run the notebooks at their real size and keep the outputs (make notebooks ONLY=00_tour)"
	@echo "make docs       make the tables of docs/configs.md anew, from the configs and the records"
	@echo "make venv       only create .venv"

venv: $(STAMP)

# editable_mode=compat: a plain path entry. setuptools' import hook would lose to the clone's own folder where that is
# called vtjax and one works beside it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("vtjax needs Python 3.11 or newer, found %d.%d; try: make PYTHON=python3.11" % v[:2])'
	@test -x $(BIN)/python || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing vtjax and its dependencies into .venv (one to three minutes) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e '.[dev]'
	@touch $@

FRESH ?=
demo: $(STAMP)
	@FRESH=$(FRESH) $(BIN)/python experiments/vit/demo.py

test: lint
	@$(BIN)/python -m pytest -q -n auto --maxprocesses=4 --dist loadfile --durations=10

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -q --durations=10 -m slow

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

ONLY ?= *
notebooks: $(STAMP)
	@$(BIN)/python notebooks/execute.py $(wildcard notebooks/$(ONLY).ipynb)

docs: $(STAMP)
	@$(BIN)/python -m docs.make_configs
