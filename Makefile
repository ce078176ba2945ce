# Everything here needs Python 3.11 and make, nothing else: the first target that needs it sets up .venv.

PYTHON ?= python3.11
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.complete
RIVALS := .venv-rivals
CODE := lightning_ckptless tests $(wildcard examples benchmarks)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-lightning test-quick lint types docs bench bench-rivals format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## set up .venv; every other target does it when needed

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) is not there. Install Python 3.11, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setting up $(VENV) (once, some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt torch==2.13.0
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## train a small GPT on CPU ranks, kill some of them, compare with the run that nobody killed
	@$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)  ## run the tests; ARGS="tests/protocol -x" for some
	@$(BIN)/python -m pytest -m "not long" $(ARGS)

test-all: $(STAMP)  ## run the long ones as well
	@$(BIN)/python -m pytest $(ARGS)

test-lightning: $(STAMP)  ## run Lightning's own tests with our strategy, compared with DDP; ARGS="--lightning CLONE"
	@$(BIN)/python -m tests.upstream $(ARGS)

test-quick: $(STAMP)  ## run all but the slow tests
	@$(BIN)/python -m pytest -m "not slow and not long" $(ARGS)

lint: $(STAMP)  ## check style and formatting
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)

format: $(STAMP)  ## mend what can be mended by a program
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

types: $(STAMP)  ## check types, strictly
	@$(BIN)/mypy

docs: $(STAMP)  ## build the documentation into site/, strictly
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

bench: $(STAMP)  ## measure; takes long and wants a quiet machine
	@$(BIN)/python -m benchmarks $(ARGS)

bench-rivals: $(RIVALS)/.complete  ## set up .venv-rivals with torchft and nvidia-resiliency-ext, for `make bench`

$(RIVALS)/.complete: pyproject.toml constraints.txt benchmarks/rivals/constraints.txt
	@echo "setting up $(RIVALS) (once, some minutes)"
	@test -x $(RIVALS)/bin/python || $(PYTHON) -m venv $(RIVALS)
	@$(RIVALS)/bin/python -m pip --disable-pip-version-check --quiet install \
	  --constraint constraints.txt --constraint benchmarks/rivals/constraints.txt torch==2.13.0 '.[benchmarks]'
	@touch $@

clean:  ## remove everything that was built or set up
	rm -rf $(VENV) $(RIVALS) site build dist demo_output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
