# make quickstart   train a tiny GPT with DeepSpeed on 2 ranks, merge its checkpoints, load and compare (CPU, minutes)
# make test         the test suite, against checkpoints that DeepSpeed writes; and, once tests/cluster/install.sh has run,
#                   launch/ on a Slurm cluster of several hosts and over ssh, on this machine
# make check        ruff, mypy --strict, import directions
#
# PYTHON chooses the interpreter. If it has torch already, the environment sees its packages and installs no other.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test check clean
.DELETE_ON_ERROR:

$(VENV)/installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) -c "import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))" 2>/dev/null \
	  > $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/own_torch.pth || true
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --editable ".[test,check]"
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python launch/quickstart.py --out quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest --quiet tests/test_architecture.py

clean:
	rm -rf $(VENV) quickstart build dist *.egg-info
