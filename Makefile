# One command each. `make serve` and `make test` work in a fresh clone with Python 3.11 to 3.13.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NIXL := $(VENV)/.nixl

.PHONY: serve test test-all lint bench bench-handoff proof fuzz chaos-handoff chaos-stops test-gpu bench-gpu bench-peers clean

serve: $(INSTALLED)
	$(BIN)/pdq serve $(ARGS)

# Two processes of tests, as many as the smallest machine has cores (tests/support/schedule.py).
test: $(INSTALLED) $(NIXL) lint
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

# The slow ones as well. What has its own command below stays with it: proof, fuzz, and all of chaos-*.
test-all: $(INSTALLED) $(NIXL) lint
	$(BIN)/python -m pytest -n 2 $(ARGS)

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

# Ours and every peer that is named over HTTP, under the same loads on two cores: ARGS="vllm=PYTHON", the python
# of an environment such as `python -m bench.peers install vllm FOLDER` makes.
bench-peers: $(INSTALLED)
	$(BIN)/python -m bench.peers loads $(ARGS)

# The handoff protocol: a minute of random schedules, every schedule of a prompt and a move, three blocks and two
# faults, and each rule taken out; the same for streams of tokens. Minutes; `make test` has a part of each.
proof: $(INSTALLED)
	$(BIN)/python -m tests.support.protocol schedules
	$(BIN)/python -m tests.support.protocol mutations
	$(BIN)/python -m tests.support.protocol exhaustive
	$(BIN)/python -m tests.support.streams schedules
	$(BIN)/python -m tests.support.streams mutations

# Every decoder under atheris (libFuzzer): five minutes, or `ARGS="codec --seconds 3600"`.
fuzz: $(INSTALLED)
	$(PIP_INSTALL) atheris
	$(BIN)/python -m tests.fuzz $(ARGS)

# Every fault at every moment of a handoff, over shm and both wires of tcp: 219 cases, 45 minutes;
# `make test` has a sample. CHAOS_TABLE=FILE in the environment adds a row per case to that file.
chaos-handoff: $(INSTALLED)
	CHAOS=all $(BIN)/python -m pytest tests/faults/test_handoff_chaos.py $(ARGS)

# A gateway and nodes stopped for 1 to 30 s, with default beats: 15 cases with nodes that lack an engine, 20 of
# a whole system, 20 minutes; `make test` has a short one. CHAOS_TABLE as above.
chaos-stops: $(INSTALLED)
	CHAOS=all $(BIN)/python -m pytest tests/integration/test_stopped_processes.py tests/faults/test_stopped.py $(ARGS)

# For a bare machine with torch, triton and transformers, and no network: no installation.
test-gpu:
	$(PYTHON) -m pytest -c tests/gpu/pytest.ini --rootdir tests/gpu --confcutdir tests/gpu -m gpu -ra tests/gpu $(ARGS)

bench-gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

# Modules are compiled when they are first imported: most never are. Kept, or each process of the tests
# would compile them anew.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) "torch>=2.11"
	$(PIP_INSTALL) --editable ".[dev]"
	touch $@

# Without the CUDA 13 build, and torch's own CUDA, that nixl's package asks for: it runs on CPU here.
$(NIXL): $(INSTALLED)
	$(PIP_INSTALL) --no-deps nixl nixl-cu12 \
		&& touch $@ || echo "nixl cannot be installed here: its tests skip" >&2

clean:
	rm -rf $(VENV) build dist *.egg-info
