# Two commands matter: `make demo` and `make test`. Both set the environment up first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-matrix soak lint type fmt unit figures api gpu-check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make setup PYTHON=python3.12"; exit 1; }
	@echo "setup: installing torch (CPU build), transformers and the rest into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup
	@$(BIN)/revivemoe demo

test: lint type
	$(BIN)/python -m pytest -q

# Every kind of fault at every point of a step, over both transports: about 25 minutes.
test-matrix: setup
	$(BIN)/python -m pytest -q -m matrix tests/dist/test_matrix.py

# Load and faults of every kind for 30 minutes; ARGS="--minutes 5 --seed 7" for others.
soak: setup
	@$(BIN)/revivemoe bench soak $(ARGS)

unit: setup
	$(BIN)/python -m pytest -q tests/unit

# Sizes, circles and layers of src/revivemoe beside what is aimed at; ARGS=--json for all of it.
figures: setup
	@$(BIN)/python tools/figures.py $(ARGS)

# Write the table of request fields into docs/api.md, from the code.
api: setup
	@$(BIN)/python tools/api_fields.py

lint: setup
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools

type: setup
	$(BIN)/mypy
	$(BIN)/mypy tools

fmt: setup
	$(BIN)/ruff check --fix src tests tools
	$(BIN)/ruff format src tests tools

# On a machine with a CUDA device and torch already there: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu-check:
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PYTHON) -m pytest -q tests/gpu tests/unit/comm/test_nccl.py tests/unit/model/test_sampling.py tests/unit/health

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
