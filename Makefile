# What a developer and CI type. `make` alone lists it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt $(if $(CI),--quiet)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A cluster's own MPI knows its network and its scheduler: the Open MPI wheel would hide it.
MPI := $(if $(shell command -v mpirun || command -v mpiexec),,mpi)

.PHONY: help install demo test test-matrix test-faults test-gpu test-transfoxl bench-transfoxl deepspeed horovod lint \
  format clean

help: ## what you are reading
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "make install PYTHON=python3.12        another interpreter than python3"
	@echo "make install TORCH_INDEX=URL          another package index for torch; without CUDA:"
	@echo "                                      https://download.pytorch.org/whl/cpu"
	@echo "make test ARGS=\"-m 'not slow' -x\"    options for pytest"
	@echo "make test-faults ARGS=\"--case kill-7\" one case again"

install: $(VENV)/.install ## make .venv with prothpc in it

demo: install ## a small corpus, a small model, a checkpoint: the whole chain in a minute
	$(BIN)/python -m hpc.demo

test: $(VENV)/.test $(VENV)/.deepspeed ## every test; root gets the system programs that tests need, too
	@scripts/system-tools
	@scripts/build-horovod $(VENV) --constraint constraints.txt $(if $(CI),,|| \
	  echo "  NOT ALL TESTS WILL RUN: Horovod could not be built here, so its tests skip" >&2)
	$(BIN)/python -m pytest $(ARGS)

test-matrix: $(VENV)/.test deepspeed horovod ## engines, precisions, optimisers and ranks: docs/engine-matrix.md
	$(BIN)/python tests/hpc/engine_matrix.py --write docs/engine-matrix.md

test-faults: $(VENV)/.test ## kills, full disks and damaged files while records are made
	$(BIN)/python tests/preprocessing/faults.py $(ARGS)

test-gpu: $(VENV)/.test ## the tests that need a GPU, where there is one
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-transfoxl: build/transfoxl/.install ## Transformer-XL beside transformers 4.37.2, the last that runs it
	PYTHONPATH=. build/transfoxl/bin/python tests/models/transfoxl_reference.py $(or $(ARGS),check)

bench-transfoxl: build/transfoxl/.install ## a training step of Transformer-XL beside that of transformers
	PYTHONPATH=. build/transfoxl/bin/python -m hpc.bench.transfoxl_step

deepspeed: $(VENV)/.deepspeed ## add DeepSpeed to .venv

horovod: install ## build Horovod for this torch, once, and add it to .venv
	scripts/build-horovod $(VENV) --constraint constraints.txt

lint: $(VENV)/.dev ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and the demo's runs/demo
	rm -rf $(VENV) runs/demo build *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that only it sees TORCH_INDEX. Without build isolation pip builds
# with the setuptools that constraints.txt names and downloads nothing twice.
$(VENV)/.install: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) setuptools
	$(PIP) $(addprefix --extra-index-url ,$(TORCH_INDEX)) torch
	$(PIP) --no-build-isolation --editable '.$(addprefix [,$(addsuffix ],$(MPI)))'
	@touch $@

$(VENV)/.test $(VENV)/.dev $(VENV)/.deepspeed: $(VENV)/.%: $(VENV)/.install
	$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

# An environment of its own, on top of .venv's torch: its older packages hide those of .venv.
build/transfoxl/.install: $(VENV)/.install
	$(BIN)/python -m venv build/transfoxl
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > "$$(build/transfoxl/bin/python -c \
	  'import site; print(site.getsitepackages()[0])')/beneath.pth"
	build/transfoxl/bin/python -m pip install $(if $(CI),--quiet) transformers==4.37.2
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "prothpc needs Python 3.10 or newer: name one with 'make install PYTHON=...'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
