# make quickstart     train a tiny GPT with DeepSpeed on 2 ranks, merge its checkpoints, load and compare (CPU, minutes)
# make test           the test suite, against checkpoints that DeepSpeed writes; and, once tests/cluster/install.sh has run,
#                     launch/ on a Slurm cluster of several hosts and over ssh, on this machine.
#                     make test K=word: only the tests with this word in their names (pytest -k)
# make test-fast      the tests that need neither a run of DeepSpeed nor the cluster: two minutes
# make test-pythons   the tests that need no torch, on each Python from 3.10 on that this machine has, and with the oldest dependencies
# make check          ruff, mypy --strict, import directions
# make docs           the documentation as a site, in site/; links are checked
#
# PYTHON chooses the interpreter. If it has torch already, the environment sees its packages and installs no other torch.
# This folder comes before them, or a wsm_ds among them would be the one that is imported.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
K      ?=
PYTEST := $(BIN)/python -m pytest $(if $(K),-k '$(K)')
PYENVS := $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.1*/bin)
space  := $(subst ,, )
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-fast test-pythons check docs clean
.DELETE_ON_ERROR:

$(VENV)/installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	{ echo "$(CURDIR)"; \
	  $(PYTHON) -c "import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))" 2>/dev/null || true; } \
	  > $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/own_torch.pth
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --editable ".[test,check]"
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python launch/quickstart.py --out quickstart

test: $(VENV)/installed
	$(PYTEST)

test-fast: $(VENV)/installed
	$(PYTEST) -m "not deepspeed and not cluster"

test-pythons: $(VENV)/installed
	PATH="$(subst $(space),:,$(PYENVS)):$$PATH" $(BIN)/python -m nox

check: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest --quiet tests/test_architecture.py

docs: $(VENV)/docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .nox quickstart build dist site *.egg-info
