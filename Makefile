# Two commands matter: `make demo` and `make test`. Both set the environment up first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.installed
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-matrix test-clients test-models soak lint type fmt unit figures api gpu-check clean

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

# On two cores at once. What starts no deployment comes first, so that what is broken shows early; the
# others go by files, whose tests share deployments.
SMALL = tests/unit tests/field tests/sim
test: lint
	@echo "types are checked beside the first tests"; $(MAKE) -s type & types=$$!; \
		$(BIN)/python -m pytest -q -n 2 $(SMALL); tests=$$?; wait $$types && exit $$tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests/gpu tests/dist

# Every kind of fault at every point of a step, over both transports: about 25 minutes.
test-matrix: setup
	$(BIN)/python -m pytest -q -m matrix tests/dist/test_matrix.py tests/dist/test_batch_invariant.py

# Every MoE architecture of the installed transformers, tiny, against generate: writes docs/models.md,
# half a minute.
test-models: setup
	$(BIN)/python -m pytest -q -m models tests/models

# Clients of other projects (openai, litellm, langchain, lm-eval, aiperf, curl, nginx, a browser) against
# a served checkpoint: 3 to 4 minutes.
test-clients: setup $(CLIENTS_STAMP)
	$(BIN)/python -m pytest -q -m clients tests/clients

$(CLIENTS_STAMP): $(STAMP) tests/clients/requirements.txt
	@test -x $(CLIENTS)/bin/python || $(BIN)/python -m venv $(CLIENTS)
	@echo "test-clients: installing the clients into $(CLIENTS) ..."
	@$(CLIENTS)/bin/python -m pip install -q --disable-pip-version-check -r tests/clients/requirements.txt
	@touch $(CLIENTS_STAMP)

# Load and faults of every kind for 30 minutes; ARGS="--minutes 5 --seed 7" for others.
soak: setup
	@$(BIN)/revivemoe bench soak $(ARGS)

# What computes no model, for in between: about a minute. `make test` has the others, too.
COMPUTING = tests/unit/model tests/unit/kernels tests/unit/checkpoint/test_reference_screen.py \
	tests/unit/checkpoint/test_hub.py tests/unit/bench/test_soak_prompts.py
unit: setup
	$(BIN)/python -m pytest -q -n 2 tests/unit $(COMPUTING:%=--ignore=%)

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
	rm -rf $(VENV) $(CLIENTS) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
