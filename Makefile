# All targets need Python 3.11 and make, nothing else: the first target that needs .venv sets it up.

PYTHON ?= python3.11
VENV ?= .venv
ARGS ?=
# Tests with recoveries mostly wait, so two processes share two cores. Tests in one file share fixtures.
PARALLEL := -n 2 --dist loadfile

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.complete
RIVALS := .venv-rivals
STORES := .venv-loggers
THIRD_PARTY := .venv-third-party
CODE := lightning_ckptless tests $(wildcard examples benchmarks)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-quick test-lightning test-loggers test-third-party test-versions wheel lint types docs bench soak bench-rivals format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## set up .venv; other targets do this when needed

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) not found. Install Python 3.11, or set its path: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setting up $(VENV) (once, takes some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt torch==2.13.0
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## train a small GPT on two CPU ranks, kill ranks, and compare with the undisturbed run
	@$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)  ## run all but the long tests, in two processes; ARGS="tests/protocol -x", ARGS="-n 0"
	@$(BIN)/python -m pytest -m "not long" $(PARALLEL) $(ARGS)

test-all: $(STAMP)  ## run all tests, including the long ones
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-lightning: $(STAMP)  ## run Lightning's own tests with our strategy and with DDP; ARGS="--lightning CLONE"
	@$(BIN)/python -m tests.upstream $(ARGS)

test-quick: $(STAMP)  ## run all but the slow and the long tests
	@$(BIN)/python -m pytest -m "not slow and not long" $(ARGS)

test-loggers: $(STORES)/.complete  ## run the tests with W&B, MLflow and Comet, in .venv-loggers
	@$(STORES)/bin/python -m pytest tests/faults/test_loggers.py tests/trainer/test_logger_identity.py $(ARGS)

$(STORES)/.complete: pyproject.toml constraints.txt tests/lab/constraints-loggers.txt
	@echo "setting up $(STORES) (once, takes some minutes)"
	@test -x $(STORES)/bin/python || $(PYTHON) -m venv $(STORES)
	@$(STORES)/bin/python -m pip --disable-pip-version-check --quiet install \
	  --constraint constraints.txt --constraint tests/lab/constraints-loggers.txt torch==2.13.0 --editable '.[dev,loggers]'
	@touch $@

test-third-party: $(THIRD_PARTY)/.complete  ## run the tests with third-party projects, in .venv-third-party
	@$(THIRD_PARTY)/bin/python -m pytest tests/third_party $(ARGS)

$(THIRD_PARTY)/.complete: pyproject.toml tests/third_party/constraints.txt tests/third_party/torchvision_on_cpu.py
	@echo "setting up $(THIRD_PARTY) with a dozen projects, a download of about 2 GB (once, takes some minutes)"
	@test -x $(THIRD_PARTY)/bin/python || $(PYTHON) -m venv $(THIRD_PARTY)
	@$(THIRD_PARTY)/bin/python -m pip --disable-pip-version-check --quiet install \
	  --constraint tests/third_party/constraints.txt torch==2.13.0
	@$(THIRD_PARTY)/bin/python -m pip --disable-pip-version-check --quiet install \
	  --constraint tests/third_party/constraints.txt --editable '.[third-party]'
	@$(THIRD_PARTY)/bin/python tests/third_party/torchvision_on_cpu.py
	@touch $@

test-versions: $(STAMP)  ## test the lowest, a middle and the newest Python, torch and Lightning; ARGS="newest", ARGS="--all --record"
	@$(BIN)/python -m tests.versions $(ARGS)

wheel: $(STAMP)  ## build the wheel into dist/ and test it in an empty environment
	@$(BIN)/python -m tests.versions --wheel

lint: $(STAMP)  ## check style and formatting
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)

format: $(STAMP)  ## fix style and formatting automatically
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

types: $(STAMP)  ## check types with mypy --strict
	@$(BIN)/mypy

docs: $(STAMP)  ## build the documentation into site/, with warnings as errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

bench: $(STAMP)  ## run the benchmarks; takes long and needs an idle machine
	@$(BIN)/python -m benchmarks $(ARGS)

soak: $(STAMP)  ## inject a thousand random faults; resumes after an interruption; ARGS="--seed 7"
	@$(BIN)/python -m tests.soak $(ARGS)

bench-rivals: $(RIVALS)/.complete  ## set up .venv-rivals with torchft and nvidia-resiliency-ext for `make bench`

$(RIVALS)/.complete: pyproject.toml constraints.txt benchmarks/rivals/constraints.txt
	@echo "setting up $(RIVALS) (once, takes some minutes)"
	@test -x $(RIVALS)/bin/python || $(PYTHON) -m venv $(RIVALS)
	@$(RIVALS)/bin/python -m pip --disable-pip-version-check --quiet install \
	  --constraint constraints.txt --constraint benchmarks/rivals/constraints.txt torch==2.13.0 '.[benchmarks]'
	@touch $@

clean:  ## remove all environments, build output and caches
	rm -rf $(VENV) $(RIVALS) $(STORES) $(THIRD_PARTY) site build dist demo_output .mypy_cache .pytest_cache .ruff_cache \
	  .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
