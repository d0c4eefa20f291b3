# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv, installs everything and runs.
# On Linux, PyPI's torch comes with CUDA; for the CPU build set PIP_EXTRA_INDEX_URL to PyTorch's CPU index.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: demo test lint unit bench clean

demo: .venv/demo
	$(BIN)/adapter demo

test: lint unit

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Each process computes on one thread: the tests' matrices are small.
unit: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

bench: .venv/test
	$(BIN)/python benchmarks/merge.py --peft
	$(BIN)/python benchmarks/many.py
	$(BIN)/python benchmarks/fold.py --peft
	$(BIN)/python benchmarks/rules.py
	$(BIN)/python benchmarks/live.py
	$(BIN)/python benchmarks/batches.py
	$(BIN)/python benchmarks/activations.py

# Torch first, at its pin, so that no other package chooses its release.
.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	@touch $@

.venv/test: .venv/demo
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .cache
