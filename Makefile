PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TYPES := build/types/tonefield
FOLDERS := $(filter-out tonefield tests,$(patsubst %/__init__.py,%,$(wildcard */__init__.py)))
SCRIPTS := $(filter-out setup.py,$(wildcard *.py))

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow style quality types bench docs wheel clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'VENV=$(VENV) PYTHON=$(PYTHON) can be set; ARGS="..." is passed on to the command that a target runs.'

demo: $(INSTALLED) ## Speak the ten digits, and make a few sounds and their spectrograms, in demo/
	@$(BIN)/python inference.py --output_dir demo/digits
	@$(BIN)/python -m tonefield.data.demo --output_dir demo $(ARGS)

test: $(INSTALLED) ## Run the tests, without the slow ones
	@$(BIN)/python -m pytest $(PROCESSES) $(ARGS)

test-slow: $(INSTALLED) ## Run the slow tests only
	@$(BIN)/python -m pytest -m slow $(PROCESSES) $(ARGS)

# A process for each core is faster than a thread for each. Tests of one file may go on from each other.
test test-slow: PROCESSES = --numprocesses auto --maxprocesses 8 --dist loadfile
test test-slow: export OMP_NUM_THREADS = 1
test test-slow: export HF_HUB_OFFLINE = 1
test test-slow: export HF_DATASETS_OFFLINE = 1
test test-slow: export TOKENIZERS_PARALLELISM = false

style: $(INSTALLED) ## Repair lint and formatting
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

quality: $(INSTALLED) ## Check lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

# A type checker reads neither `__path__` nor import hooks, so it is shown the package as a wheel lays it out, in links.
types: $(INSTALLED) ## Check types only
	@rm -rf $(TYPES) && mkdir -p $(TYPES)
	@cp -Rs $(addprefix $(CURDIR)/,$(wildcard tonefield/*) $(FOLDERS) $(SCRIPTS)) $(TYPES)/
	@$(BIN)/pyright --pythonpath $(BIN)/python $(ARGS)

bench: $(INSTALLED) ## Run every benchmark and end with one table; ARGS="mel solvers" runs those, ARGS=--quick at toy sizes
	@$(BIN)/python benchmarks/all.py $(ARGS)

docs: $(INSTALLED) ## Write the flags of the scripts and the pictures into docs/ anew
	@$(BIN)/python docs/build.py

wheel: $(INSTALLED) ## Build the sdist, and the wheel from it, into dist/
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation $(ARGS) > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@ls dist/*

clean: ## Remove build products and caches (not the environment)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	@find . -path './.*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "tonefield needs Python 3.11 or newer, $(PYTHON) is not: try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Preparing the environment $(VENV); a few minutes the first time"
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
