# `make demo` and `make test` do all set-up on a machine that has Python 3.11 or newer and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.PHONY: help install install-dev demo test lint clean

help:
	@echo "make demo     train ZZHNet nano on synthetic scenes and draw its predictions (runs/demo)"
	@echo "make test     run the tests"
	@echo "make lint     ruff and mypy"
	@echo "make install  only the set-up: $(VENV), with zzhnet_jax installed editable"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

demo: install
	$(BIN)/python train.py --config configs/zzhnet_nano_synthetic.py

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info
