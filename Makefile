# Everything runs in .venv, made on first use and reused after that.
#   make demo       train the quickstart, add a fifth task, show the report
#   make test       the fast tests          make test-all   all of them
#   make lint       style and types         make clean      remove what make and the tests made
# Without a GPU, the CPU build of torch saves gigabytes: put the index of such builds in PIP_EXTRA_INDEX_URL first.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.molora-installed
DEV_STAMP := $(VENV)/.molora-installed-dev
INSTALLED := $(if $(wildcard $(DEV_STAMP)),$(DEV_STAMP),$(RUN_STAMP))
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

# glibc returns every large buffer to the system and asks for it again: CPU training takes three times as long.
export MALLOC_MMAP_THRESHOLD_ := 8589934592
export MALLOC_TRIM_THRESHOLD_ := 8589934592

.PHONY: demo test test-all lint clean

# One thread: the embedded base is so small that threads wait for each other longer than they compute.
demo: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/molora train recipes/quickstart.yaml
	OMP_NUM_THREADS=1 $(BIN)/molora add-expert runs/quickstart --recipe recipes/add_expert.yaml

test: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(PYTEST_ARGS)

test-all: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(RUN_STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP) -e .
	touch $@

$(DEV_STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "molora needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
