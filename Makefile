# `make help` lists the targets. Everything lives in .venv; nothing is installed elsewhere.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
NATIVE := $(shell find native setup.py -name '*.[ch]' -o -name '*.py' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup chat doctor test support bench bench-peers sanitize bench-model bench-open bench-plan native train wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) $(VENV)/.native ## .venv with everything, and the C library; seconds when nothing changed

$(STAMP): requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found. Install Python 3.11 or newer, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old; the pinned versions need 3.11 or newer. Say make PYTHON=python3.12"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "error: no virtual environment. On Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements-dev.txt
	@touch $@

$(VENV)/.native: $(STAMP) $(NATIVE) pyproject.toml
	@command -v $${CC:-cc} >/dev/null || { echo "error: no C compiler ($${CC:-cc}). On Debian: apt-get install gcc libc6-dev"; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

chat: setup ## talk to the embedded model (or: make chat ARGS="--model_path ... --gguf_path ...")
	@$(PY) -m ktransformers.local_chat $(ARGS)

doctor: setup ## what this machine has, whether the kernels compute right on it, and what to fix
	@$(PY) -m ktransformers doctor $(ARGS)

test: setup ## every test
	$(PY) -m pytest $(ARGS)

bench: setup ## speed of the C library beside this machine's measured limits
	$(PY) -m tests.bench.bench_native $(if $(JSON),--json $(JSON)) $(ARGS)

bench-peers: setup ## the C library beside llama.cpp, kt-kernel and torch, in .venv-peers (JSON=file ARGS="--quick ...")
	$(PY) -m tests.bench.bench_peers $(if $(JSON),--json $(JSON)) $(ARGS)

bench-open: setup ## time to open a 5 GB GGUF and to build all handles
	$(PY) -m tests.bench.bench_open $(ARGS)

bench-model: setup ## load time, memory and tokens/s of whole models
	$(PY) -m tests.bench.bench_model $(ARGS)

bench-plan: setup ## what kt plan predicts against what is measured, memory and tokens/s
	$(PY) -m tests.bench.bench_plan $(if $(JSON),--json $(JSON)) $(ARGS)

sanitize: ## the C library under AddressSanitizer and UBSan
	$(MAKE) -C native sanitize

native: setup ## rebuild the C library

support: setup ## README's table of families, from the tables that the tests run over
	$(PY) -m tests.support

train: setup ## train the embedded model again (under two hours on a CPU)
	$(PY) models/training/train.py $(ARGS)

wheel: setup ## dist/*.whl and dist/*.tar.gz
	$(PY) setup.py --quiet bdist_wheel sdist

clean: ## remove what was built, .venv included
	rm -rf $(VENV) .venv-peers build dist *.egg-info ktransformers/*.so native/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
