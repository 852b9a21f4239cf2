# `make demo` and `make test` set everything up themselves; see README.md.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests compile to files that the next run finds, wherever Python is told not to write them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test tests check fast stress fuzz fuzz-structured matrix simulate-faults setup format clean

demo: $(STAMP)
	$(BIN)/atoll demo

# Four at a time, for those that start servers and sites wait for them half of their time.
TOGETHER := -n 4 --dist loadfile --no-loadscope-reorder

# The checks run beside the tests, for both are long.
test: $(STAMP)
	$(MAKE) --jobs=2 check tests

tests: $(STAMP)
	$(BIN)/python -m tests.support.processes
	$(BIN)/python -m pytest $(TOGETHER) -m "not matrix and not gpu"

fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not processes and not federation and not slow and not matrix and not gpu"

# What starts processes or reads a clock, with two busy loops for each core beside it.
stress: $(STAMP)
	$(BIN)/python -m tools.busy $(BIN)/python -m pytest $(TOGETHER) -m "(processes or federation) and not matrix and not gpu"

matrix: $(STAMP)
	ATOLL_TEST_PROFILE=matrix $(BIN)/python -m pytest -m matrix

# Messages in place of what sites and servers send, that atheris makes up by the branches they reach.
CASES ?= 1000000
fuzz: $(STAMP)
	$(BIN)/python -m tests.protocol.fuzzing --cases $(CASES)

# As many by the strategies of the suite, 250,000 a test; hours on one core.
fuzz-structured: $(STAMP)
	ATOLL_TEST_PROFILE=fuzz $(BIN)/python -m pytest tests/protocol/test_fuzzed_replies.py

# Federations under faults that a seed decides; see docs/fault-simulation.md.
SEEDS ?= 10000
FIRST ?= 0
simulate-faults: $(STAMP)
	$(BIN)/python -m tests.fault_simulation --seeds $(SEEDS) --from $(FIRST)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.declared
	$(BIN)/python -m tests.budget

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(STAMP)

# pip would compile every file of every package on one core; Python compiles what is imported when it is.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with venv was found; make PYTHON=/path/to/it"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]' --constraint constraints.txt
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs kits .mypy_cache .ruff_cache .pytest_cache
