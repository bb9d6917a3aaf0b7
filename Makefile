PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
# Stages that DVC starts must find this environment's python first.
RUN = PATH="$(abspath $(BIN)):$$PATH"

.PHONY: help install demo up down test test-long lint audit docs

help:
	@echo "make demo       set up $(VENV) and edit the sample clip from end to end"
	@echo "make up         start Prefect, its worker and the MLflow UI in the background"
	@echo "make down       end them"
	@echo "make test       set up $(VENV) and run the tests"
	@echo "make test-long  the same with full fuzzing and repetition"
	@echo "make lint       ruff and mypy"
	@echo "make docs       write the documentation's generated pages, and build it in site/"
	@echo "make audit      known vulnerabilities of the pinned packages (asks the network)"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/.installed

# The demo has the machine to itself: threads that spin while they wait tune it in two thirds of the time.
demo: install
	@$(RUN) OMP_WAIT_POLICY=ACTIVE dvc repro score@ball
	@$(RUN) python -m tasks show --clip ball

up: install
	@$(RUN) python -m flows.services up

down: install
	@$(RUN) python -m flows.services down

test: install
	@$(RUN) python -m pytest -m "not long"

test-long: install
	@$(RUN) python -m pytest --timeout 7200

lint: install
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

docs: install
	@$(RUN) python -m docs.generate
	@$(RUN) NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet

# Each pin as it stands: nothing is resolved or installed for it. Strict: a package that nothing is known of fails it.
audit: install
	@$(RUN) pip-audit --strict --requirement constraints.txt --no-deps --disable-pip
