PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet

.PHONY: demo test check mlproject clean

# Train the digits project with its three optimizers, run every probe, print the table.
demo: .venv/installed
	$(BIN)/lsa study digits --workers 2

# Three at once also on two cores: the slow tests wait for servers and workers a good part of theirs.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

mlproject: .venv/installed
	$(BIN)/python -m lsa mlproject > MLproject.new || { rm -f MLproject.new; exit 1; }
	mv MLproject.new MLproject

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml
	$(PIP) --editable '.[dev]'
	touch .venv/installed $@

clean:
	rm -rf .venv
