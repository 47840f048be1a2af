# One command each. `make serve` and `make test` work in a fresh clone with Python 3.11 to 3.13.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: serve test lint bench bench-handoff chaos-handoff test-gpu bench-gpu clean

serve: $(INSTALLED)
	$(BIN)/pdq serve $(ARGS)

test: $(INSTALLED) lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m bench.engine $(ARGS)

# Transports against memcpy and a bare socket, then the latency of handoffs between real nodes.
bench-handoff: $(INSTALLED)
	$(BIN)/python -m bench.handoff $(ARGS)

# Every fault at every moment of a handoff, over shm and tcp: 146 cases, half an hour; `make test` has a
# sample. CHAOS_TABLE=FILE in the environment adds a row per case to that file.
chaos-handoff: $(INSTALLED)
	CHAOS=all $(BIN)/python -m pytest tests/faults/test_handoff_chaos.py $(ARGS)

# For a bare machine with torch, triton and transformers, and no network: no installation.
test-gpu:
	$(PYTHON) -m pytest -c tests/gpu/pytest.ini --rootdir tests/gpu --confcutdir tests/gpu -m gpu -ra tests/gpu $(ARGS)

bench-gpu:
	$(PYTHON) -m bench.engine --device cuda --threads 1 $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch>=2.11"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
