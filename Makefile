# `make help` lists the targets. Everything lives in .venv; nothing is installed elsewhere.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
# Modules are compiled to bytecode when they are first imported: all of torch's at once take longer than the rest of pip.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(PY) $(INSTALL)
OBJECTS := build/clib/.compiled
LLAMAFACTORY := .venv-llamafactory
NATIVE := $(shell find native setup.py -name '*.[ch]' -o -name '*.py' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev chat doctor test test-fast test-gpu support pages bench bench-setup bench-start bench-peers sanitize \
        setup-llamafactory test-llamafactory \
        bench-model bench-whole bench-serve bench-adapters bench-open bench-plan bench-attention bench-encode bench-sft bench-gpu native train \
        wheel clean tools FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# pip and the C compiler at the same time, whatever -j says.
setup: ## .venv with what the package needs, and the C library; a second when nothing changed
	@$(MAKE) --no-print-directory -j2 $(VENV)/.native

setup-dev: setup ## and what the tests and benchmarks need
	@$(MAKE) --no-print-directory $(VENV)/.dev

tools:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found. Install Python 3.11 or newer, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old; the pinned versions need 3.11 or newer. Say make PYTHON=python3.12"; exit 1; }
	@command -v $${CC:-cc} >/dev/null || { echo "error: no C compiler ($${CC:-cc}). On Debian: apt-get install gcc libc6-dev"; exit 1; }

$(VENV)/.installed: requirements.txt | tools
	@echo "Python: installing torch, transformers and what they need into $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "error: no virtual environment. On Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	$(PIP) $(PIP_ARGS) -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.installed
	$(PIP) $(PIP_ARGS) -r requirements-dev.txt
	@touch $@

# What was asked for last, so that another KT_BUILD compiles again.
build/clib/.wanted: FORCE
	@mkdir -p $(@D) && { echo "$(KT_BUILD)" | cmp -s - $@ || echo "$(KT_BUILD)" > $@; }

$(OBJECTS): $(NATIVE) build/clib/.wanted | tools
	@$(PYTHON) native/objects.py
	@touch $@

$(VENV)/.native: $(VENV)/.installed $(OBJECTS) pyproject.toml
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

chat: setup ## talk to the embedded model (or: make chat ARGS="--model_path ... --gguf_path ...")
	@$(PY) -m ktransformers.local_chat $(ARGS)

doctor: setup ## what this machine has, whether the kernels compute right on it, and what to fix
	@$(PY) -m ktransformers doctor $(ARGS)

test: setup-dev ## every test
	$(PY) -m pytest $(ARGS)

test-fast: setup-dev ## some cases of every kind of test
	$(PY) -m pytest -m "not slow" $(ARGS)

test-gpu: setup-dev ## what needs a GPU, skipped where there is none (SANITIZER="compute-sanitizer --error-exitcode 1")
	TRITON_INTERPRET=0 $(SANITIZER) $(PY) -m pytest -rs tests/kernels/test_gpu.py tests/operators/test_gpu_attention.py $(ARGS)

# LLaMA-Factory and its trl ask for older packages than they run with: they come last, without what they ask for.
$(LLAMAFACTORY)/.installed: requirements-llamafactory.txt requirements.txt pyproject.toml $(OBJECTS) | tools
	@echo "Python: installing LLaMA-Factory, torch and what they need into $(LLAMAFACTORY)"
	@test -x $(LLAMAFACTORY)/bin/python || $(PYTHON) -m venv $(LLAMAFACTORY)
	$(LLAMAFACTORY)/bin/python $(INSTALL) $(PIP_ARGS) -r requirements-llamafactory.txt
	$(LLAMAFACTORY)/bin/python $(INSTALL) $(PIP_ARGS) --no-deps llamafactory==0.9.5 trl==0.24.0
	$(LLAMAFACTORY)/bin/python $(INSTALL) --no-build-isolation --no-deps --editable .
	@printf '#!%s\nfrom ktransformers.sft.llamafactory import main\n\nmain()\n' "$(abspath $(LLAMAFACTORY))/bin/python" \
	    > $(LLAMAFACTORY)/bin/llamafactory-cli
	@touch $@

setup-llamafactory: $(LLAMAFACTORY)/.installed ## .venv-llamafactory, whose llamafactory-cli trains on our operators

test-llamafactory: setup-llamafactory ## LLaMA-Factory's trainers on our operators
	$(LLAMAFACTORY)/bin/python -m pytest -rs tests/sft/test_llamafactory.py $(ARGS)

bench-setup: ## time from a fresh clone to the first answer, by parts (PIP_ARGS=..., JSON=file)
	$(PYTHON) tests/bench/bench_setup.py $(if $(JSON),--json $(JSON)) $(ARGS)

bench: setup-dev ## speed of the C library beside this machine's measured limits
	$(PY) -m tests.bench.bench_native $(if $(JSON),--json $(JSON)) $(ARGS)

bench-peers: setup-dev ## the C library beside llama.cpp, kt-kernel and torch, in .venv-peers (JSON=file ARGS="--quick ...")
	$(PY) -m tests.bench.bench_peers $(if $(JSON),--json $(JSON)) $(ARGS)

bench-open: setup-dev ## time to open a 5 GB GGUF and to build all handles
	$(PY) -m tests.bench.bench_open $(ARGS)

bench-model: setup-dev ## load time, memory and tokens/s of whole models
	$(PY) -m tests.bench.bench_model $(ARGS)

bench-attention: setup-dev ## attention over a cache beside torch's and the memory bandwidth (ARGS="--quick ...")
	$(PY) -m tests.bench.bench_attention $(if $(JSON),--json $(JSON)) $(ARGS)

bench-whole: setup-dev ## prefill and decode of whole models beside llama.cpp (JSON=file ARGS="--types Q4_K_M --depths 128")
	$(PY) -m tests.bench.bench_whole $(if $(JSON),--json $(JSON)) $(ARGS)

bench-serve: setup-dev ## kt serve under several streams, beside its engine and llama.cpp alone (JSON=file ARGS="--rounds 3")
	$(PY) -m tests.bench.bench_serve $(if $(JSON),--json $(JSON)) $(ARGS)

bench-sft: setup-dev ## training: a layer's gradients beside torch, and whole steps beside transformers + PEFT (takes 15 GB of RAM)
	$(PY) -m tests.bench.bench_sft $(ARGS)
	$(PY) -m tests.bench.bench_sft_step --inside $(if $(JSON),--json $(JSON))

bench-adapters: setup-dev ## what adapters as models of kt serve cost its engine (JSON=file ARGS="--rounds 3")
	$(PY) -m tests.bench.bench_adapters $(if $(JSON),--json $(JSON)) $(ARGS)

bench-encode: setup-dev ## how fast kt quantize encodes each type, beside reading and the torch encoder
	$(PY) -m tests.bench.bench_encode $(if $(JSON),--json $(JSON)) $(ARGS)

bench-plan: setup-dev ## what kt plan predicts against what is measured, memory and tokens/s
	$(PY) -m tests.bench.bench_plan $(if $(JSON),--json $(JSON)) $(ARGS)

bench-gpu: setup-dev ## the GPU kernels beside cuBLAS in bf16 and the measured bandwidth (JSON=file ARGS="--quick ...")
	TRITON_INTERPRET=0 $(PY) -m tests.bench.bench_gpu $(if $(JSON),--json $(JSON)) $(ARGS)

sanitize: ## the C library under AddressSanitizer and UBSan
	$(MAKE) -C native sanitize

native: ## rebuild the C library: what has changed, for the machine it runs on now
	@rm -f $(OBJECTS)
	@$(MAKE) --no-print-directory setup

bench-start: setup-dev ## seconds until commands show something and end, beside importing torch and a model class
	$(PY) -m tests.bench.bench_start $(if $(JSON),--json $(JSON)) $(ARGS)

pages: setup-dev ## write what their commands print into README and the tutorials
	$(PY) -m tests.pages

support: setup-dev ## the table of families in models/README.md, from the tables that the tests run over
	$(PY) -m tests.support

train: setup-dev ## train the embedded model again (under two hours on a CPU)
	$(PY) models/training/train.py $(ARGS)

wheel: setup-dev ## dist/*.whl and dist/*.tar.gz
	$(PY) setup.py --quiet bdist_wheel sdist

clean: ## remove what was built, .venv included
	rm -rf $(VENV) $(LLAMAFACTORY) .venv-peers build dist *.egg-info ktransformers/*.so native/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
