# `make demo` and `make test` do all set-up on a machine that has Python 3.11 or newer and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# Large arrays in large pages: otherwise a third of a training step on a CPU goes into page faults.
# glibc reads this where there is one; others take no notice.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Two workers: most of the time goes into compilation, which keeps one core busy.
PYTEST_ARGS ?= -n 2 --dist worksteal -m "not mesh and not accelerator and not aot"

.PHONY: help install install-dev demo test test-mesh test-kernels test-aot lint aot scaling clean

help:
	@echo "make demo     train ZZHNet nano on synthetic scenes and draw its predictions (runs/demo)"
	@echo "make test     run the tests"
	@echo "make test-mesh  train whole networks on eight devices and in two processes, on this machine"
	@echo "make test-kernels  interpret the kernels of TPUs and GPUs; on a GPU, run its own"
	@echo "make test-aot  compile kernels and steps for TPUs and GPUs that are not here, and check them"
	@echo "make lint     ruff and mypy"
	@echo "make aot      compile kernels and a training step for TPUs and GPUs that are not here"
	@echo "make scaling  compile training steps for slices of them, for the tables of docs/scaling.md"
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

test-mesh: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m mesh $$(grep -rl --include='*.py' 'mark\.mesh' tests)

test-kernels: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m accelerator

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compilers for TPUs and GPUs, which need neither; of another size and with other pins than the rest,
# so in an environment of their own. The CUDA plugin comes without the libraries that only a GPU uses.
AOT_VENV ?= .venv-aot
AOT_ARGS ?=
AOT_PACKAGES := jax==0.10.2 libtpu==0.0.42.1 triton==3.7.0 jax-triton==0.3.1
AOT_PLUGINS := jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2

$(AOT_VENV)/.installed-aot: pyproject.toml
	[ -x $(AOT_VENV)/bin/python ] || $(PYTHON) -m venv $(AOT_VENV)
	$(AOT_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(AOT_VENV)/bin/python -m pip install --quiet --editable ".[test]" $(AOT_PACKAGES)
	$(AOT_VENV)/bin/python -m pip install --quiet --no-deps $(AOT_PLUGINS)
	@touch $@

# Triton's interpreter computes with PyTorch.
AOT_TEST_ARGS ?= -m aot
test-aot: $(AOT_VENV)/.installed-aot
	$(AOT_VENV)/bin/python -m pip install --quiet torch==2.13.0
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m pytest -n 2 --dist worksteal $(AOT_TEST_ARGS)

aot: $(AOT_VENV)/.installed-aot
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python benchmarks/aot.py $(AOT_ARGS)

scaling: $(AOT_VENV)/.installed-aot
	$(AOT_VENV)/bin/python benchmarks/scaling.py --document docs/scaling.md

clean:
	rm -rf build dist *.egg-info
