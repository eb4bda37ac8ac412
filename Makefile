# `make demo` and `make test` do all their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# No telemetry, no look-ups: nothing leaves this machine but package downloads.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: demo test test-all lint benchmarks clean

demo: $(INSTALLED)
	$(BIN)/visard simulate demo

# A worker a core; the tests of a file share what it sets up.
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

test-all: lint
	$(BIN)/python -m pytest -m "not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmarks: $(INSTALLED)
	$(BIN)/python benchmarks/discriminator_step.py
	$(BIN)/python benchmarks/ledger.py
	$(BIN)/python benchmarks/noise_shares.py
	$(BIN)/python benchmarks/pairs.py
	$(BIN)/python benchmarks/rounds.py --stock

# torch first: where a CPU build is at hand, later packages then do not pull a CUDA one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Visard needs Python 3.11 or newer; give one with PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,ray]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
