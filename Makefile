PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
# Stages started by DVC must find this environment's python first.
RUN = PATH="$(abspath $(BIN)):$$PATH"
# Each worker takes one test file at a time, the longest first (tests/conftest.py).
WORKERS ?= 2
PYTEST = python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help install demo up down test test-fast test-long coverage lint audit docs

help:
	@echo "make demo       set up $(VENV) and edit a sample clip from end to end"
	@echo "make up         start Prefect, its worker and the MLflow UI in the background"
	@echo "make down       stop them"
	@echo "make test       set up $(VENV) and run the tests, WORKERS=$(WORKERS) at a time"
	@echo "make test-fast  run the tests of the packages that take two seconds at most, in a minute and a half"
	@echo "make test-long  run all tests, with full fuzzing and repetition"
	@echo "make coverage   run the tests and print the lines that they miss, by file"
	@echo "make lint       run ruff, mypy and import-linter"
	@echo "make docs       generate the reference pages and build the documentation in site/"
	@echo "make audit      check the pinned packages for known vulnerabilities (needs the network)"

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing the packages, which takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/.installed

demo: install
	@$(RUN) python -m tasks all --clip ball

up: install
	@$(RUN) tav up

down: install
	@$(RUN) tav down

test: install
	@$(RUN) $(PYTEST) -m "not long"

test-fast: install
	@$(RUN) $(PYTEST) -m "not long and not slow" $(addprefix tests/,tav_model tav toyworld tasks tav_cli)

coverage: install
	@$(RUN) $(PYTEST) -m "not long" --cov --cov-report=term:skip-covered

test-long: install
	@$(RUN) $(PYTEST) --timeout 7200

lint: install
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy
	@$(RUN) lint-imports

docs: install
	@$(RUN) python -m docs.generate
	@$(RUN) NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet

# Check each pin as it is, without resolving or installing anything. Strict: an unknown package is an error.
audit: install
	@$(RUN) pip-audit --strict --requirement constraints.txt --no-deps --disable-pip
