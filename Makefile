.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# To compile all of it takes long, and a tenth is ever imported; Python compiles that then, and keeps
# it. Where it may not keep it, each of the tests' processes compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

help:  ## say what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

quickstart: $(VENV)/.user  ## compare options a, b and c in a short study
	$(BIN)/losslab quickstart

up: $(VENV)/.user  ## server and worker on SQLite, until Ctrl-C
	$(BIN)/losslab up

check: $(VENV)/.developer  ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy docs/generate.py

test: check  ## check, and run the tests that need no browser, no container and little time
	$(BIN)/pytest -n 2 -m 'not slow and not browser'

# Three at a time on two cores: a fifth of their time is waiting.
test-python: $(VENV)/.developer  ## run every test except those of the containers
	$(BIN)/pytest -n 3 --durations=40 --durations-min=5

test-docker: $(VENV)/.developer  ## build the images and use the CPU stack in a container engine
	docker/tests/run.sh $(BIN)/python

test-all: check test-python test-docker  ## check, and run every test

docs: $(VENV)/.developer  ## write the generated pages, and build the documentation into site/
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --quiet --strict

clean:  ## remove what make made; experiments/ stays
	rm -rf $(VENV) build site server/dashboard/static/library *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Losslab needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[worker]'
	touch $@

$(VENV)/.developer: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[worker,dev]'
	touch $@ $(VENV)/.user

.PHONY: help quickstart up check test test-python test-docker test-all docs clean
