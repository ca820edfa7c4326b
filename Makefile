# saekit's commands, from a fresh clone on. Needed: Python 3.11 or newer, and make.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PROJECTS := pyproject.toml $(wildcard plugins/*/pyproject.toml)
RUN_READY := $(VENV)/.installed-run
DEV_READY := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Two test processes of one thread each: torch's threads of several processes slow one another many times over.
# The tests of a file run in one of them, so that what they share is made once; files with slow tests come first.
TEST_PROCESSES ?= 2
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

FUZZ ?= 10000

.DEFAULT_GOAL := help
.PHONY: help run test fuzz kills lint docs clean

help:  ## Show these commands.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## +/\t/' | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-8s %s\n' "$$name" "$$what"; done

run: $(RUN_READY)  ## Train a first SAE on the bundled model organism; ARGS="..." is handed to `saekit run`.
	$(BIN)/saekit run $(ARGS)

test: lint  ## Run every check: ruff, mypy, the tests, the documentation (built by tests/docs).
	$(TEST) -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

kills: $(DEV_READY)  ## Kill tiny runs a thousand times at random moments (half an hour); ARGS="100 --seed 7" for others.
	$(BIN)/python tests/kill/kills.py $(ARGS)

fuzz: $(DEV_READY)  ## Try FUZZ hostile inputs (10000), drawn from FUZZ_SEED, which is printed.
	@seed=$${FUZZ_SEED:-$$($(BIN)/python -c 'import random; print(random.getrandbits(32))')}; echo "FUZZ_SEED=$$seed"; \
	SAEKIT_FUZZ=$(FUZZ) $(TEST) tests/fuzz --durations=0 --hypothesis-seed=$$seed

lint: $(DEV_READY)  ## Run ruff and mypy.
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(DEV_READY)  ## Write the generated tables anew and build the documentation into site/.
	$(BIN)/python docs/tables.py
	$(BIN)/python -m mkdocs build --strict

clean:  ## Remove what these commands made, except run directories.
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUN_READY): requirements.txt $(PROJECTS) | $(BIN)/python
	$(PIP) install -r requirements.txt
	@touch $@

$(DEV_READY): requirements-dev.txt $(RUN_READY)
	$(PIP) install -r requirements-dev.txt
	@touch $@
