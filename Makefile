# make quickstart   train a tiny GPT with DeepSpeed on 2 ranks, merge its checkpoints, load and compare (CPU, minutes)
# make test         the test suite, against checkpoints that DeepSpeed writes
# make check        ruff, mypy --strict, import directions
#
# PYTHON chooses the interpreter. If it has torch already, the environment uses that one.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test check clean
.DELETE_ON_ERROR:

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $$($(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --editable ".[test,check]"
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python launch/quickstart.py --out quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_architecture.py

clean:
	rm -rf $(VENV) quickstart build dist *.egg-info
