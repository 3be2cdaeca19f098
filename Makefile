# Everything starts here. Each target creates .venv when it is missing and installs when the requirements changed.
#
#   make demo        train a small LongNet on real text (options: make demo ARGS="--minutes 1 --text ~/books")
#   make demo-distributed   the same with each sequence cut over two processes (ARGS="--steps 40": another length)
#   make test        lint, types, notebooks and tests; CI also runs test-site and test-slow
#   make test-slow   the tests that take minutes, and what test-portable runs
#   make test-portable   notebooks and tests with other processors' kernels (plain, AVX2) and 1 and 3 threads
#   make lab         JupyterLab at index.ipynb
#   make export      write the modules, the package root and README.md from the notebooks
#   make notebooks   execute all notebooks and store their outputs
#   make docs        build the site into _docs/
#   make test-site   build what is missing or older of it, and open every page in headless Chromium (needs chromium)
#   make bench       run the benchmarks and store their figures (BENCHMARKS=benchmarks/core.py ARGS=floor: a part)
#   make bench-check   measure two sections again (ten minutes) and say what is worse than what is stored
#   make lock        renew constraints.txt from what is installed
#
# PYTHON=python3.12 make test   uses another interpreter for a new .venv
# PIP_EXTRA_INDEX_URL=...       pip's own setting, e.g. for PyTorch's CPU-only wheels

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
BENCHMARKS ?= $(wildcard benchmarks/*.py)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo demo-distributed test test-slow test-portable lab export notebooks docs test-site bench bench-check lock clean

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

# One stamp stands for the whole environment. An interrupted installation leaves none and is taken up again.
$(READY): settings.ini constraints.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python {v[0]}.{v[1]} found; constraints.txt needs 3.11 or newer: PYTHON=python3.12 make ...")'
	@test -x $(BIN)/python || echo "creating $(VENV); torch is large, the first time takes some minutes"
	@test -x $(BIN)/python -a -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python -m dilated_attention_nb.training $(ARGS)

demo-distributed: $(READY)
	$(BIN)/torchrun --nproc-per-node 2 -m dilated_attention_nb.training --sequence-parallel 2 $(or $(ARGS),--minutes 2)

test: $(READY)
	$(BIN)/python scripts/run_tests.py

test-portable: $(READY)
	$(BIN)/python scripts/run_tests.py --portable

test-slow: $(READY)
	$(BIN)/python scripts/run_tests.py --slow

lab: $(READY)
	$(BIN)/jupyter lab index.ipynb

export: $(READY)
	$(BIN)/ruff format --quiet .
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python scripts/root.py
	$(BIN)/python scripts/readme.py
	$(BIN)/python scripts/defects.py

notebooks: export
	$(BIN)/python scripts/notebooks.py $(ARGS)
	$(BIN)/python scripts/readme.py

docs: $(READY)
	$(BIN)/python scripts/docs.py

test-site: $(READY)
	$(BIN)/python scripts/check_site.py $(ARGS)

bench: $(READY)
	for script in $(BENCHMARKS); do $(BIN)/python $$script $(ARGS); done

bench-check: $(READY)
	$(BIN)/python benchmarks/comparison.py --check quick
	$(BIN)/python benchmarks/core.py --check floor

lock: $(READY)
	@head -2 constraints.txt > constraints.new
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/+[A-Za-z0-9.]*$$//' | sort -f >> constraints.new
	@mv constraints.new constraints.txt; touch $(READY)

clean:
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
