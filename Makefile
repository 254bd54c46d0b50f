# Everything that is done with a checkout. `make` or `make help` lists it.
# Needed beforehand: git, make and Python 3.11 or newer, no compiler; each command sets up the rest by itself.

# Which Python the environment is made with; the first one that is new enough when it is not said.
PYTHON ?=
VENV   ?= .venv
BIN    := $(VENV)/bin
# Passed on to the command behind a target: make bench ARGS="peaks --quick"
ARGS   ?=

# One install per set of extras, renewed when a dependency, a pin or an entry point changes.
RUN_STAMP := $(VENV)/.installed-daemon
DEV_STAMP := $(VENV)/.installed-dev
DEV_GOALS := test lint faults soak fuzz client-wheel venv
# An environment for development stays one: it holds all that the smaller one does.
INSTALLED := $(if $(or $(wildcard $(DEV_STAMP)),$(filter $(DEV_GOALS),$(MAKECMDGOALS))),$(DEV_STAMP),$(RUN_STAMP))
PIP       := $(BIN)/python -m pip --disable-pip-version-check --quiet

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint data venv warm bench bench-peers faults soak fuzz client-wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# A demo that was stopped with Ctrl-C (130) has said so; make would call it an error of its own.
demo: $(INSTALLED) ## stream real and simulated Laue frames through a daemon; crystals appear as they come
	@$(BIN)/python tests/data/fetch.py || echo "demo: going on with simulated frames"
	@status=0; $(BIN)/grainwatch demo $(ARGS) || status=$$?; [ $$status -eq 130 ] || exit $$status

# Tests that start processes have the machine to themselves, all others share its cores. With ARGS: pytest's own.
test: lint warm ## all checks and all tests (20 to 30 minutes on 2 cores); ends with what was skipped
	@$(BIN)/python tests/data/fetch.py || [ $$? -eq 3 ]
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@status=0; \
	$(BIN)/python -m pytest -m "not system" --numprocesses auto --maxprocesses 8 --dist loadfile || status=$$?; \
	$(BIN)/python -m pytest -m system || status=$$?; \
	exit $$status
endif

lint: $(DEV_STAMP) ## ruff, mypy --strict and the import contracts alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy -p bench
	$(BIN)/lint-imports

data: $(INSTALLED) ## fetch the third-party Laue frames into .data, checked by sha256
	@$(BIN)/python tests/data/fetch.py $(ARGS)

warm: $(INSTALLED) ## compile the kernels into the cache, so that no start-up does
	@$(BIN)/grainwatch warm

bench: $(INSTALLED) warm ## measure every figure that the project claims
	@$(BIN)/python -m bench $(ARGS)

bench-peers: $(INSTALLED) ## measure LaueTools on this machine, in an environment of its own (.peers)
	@$(BIN)/python -m bench.peers $(ARGS)

faults: $(DEV_STAMP) warm ## kill parts of a running daemon at random for minutes
	@$(BIN)/python -m tests.system.faults $(ARGS)

soak: $(DEV_STAMP) warm ## run a daemon for minutes, watch its memory and its accounts
	@$(BIN)/python -m tests.system.soak $(ARGS)

fuzz: $(DEV_STAMP) ## feed 100,000 broken messages to the decoders and parsers
	@$(BIN)/python -m tests.wire.fuzz $(ARGS)

client-wheel: $(DEV_STAMP) ## build the wheel that other programs install, into dist/
	$(BIN)/python -m build --wheel --no-isolation --outdir dist deploy/client-wheel

venv: $(DEV_STAMP) ## create the environment for development and do nothing else

clean: ## remove what the tools leave behind; keeps .venv, .data and .peers
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .out dist build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -not -path './.peers/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@new_enough='import sys; sys.exit(sys.version_info < (3, 11))'; python="$(PYTHON)"; \
	for name in python3.11 python3.12 python3.13 python3 python; do \
	  if [ -z "$$python" ] && "$$name" -c "$$new_enough" 2>/dev/null; then python="$$name"; fi; \
	done; \
	if ! "$$python" -c "$$new_enough" 2>/dev/null; then \
	  version="$$("$$python" --version 2>/dev/null)" || version="nothing that runs"; \
	  echo "make: $${python:-python3} is $$version;" \
	    "grainwatch needs Python 3.11 or newer; install it, or say make PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	echo "creating $(VENV) with $$python"; \
	if ! "$$python" -m venv "$(VENV)"; then \
	  rm -rf "$(VENV)"; \
	  echo "make: $$python cannot create an environment (Debian, Ubuntu: apt install python3-venv)" >&2; \
	  exit 1; \
	fi

$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing grainwatch and what it needs into $(VENV) (a few minutes and 1 GB of disk the first time)"
	@$(PIP) install -c constraints.txt -e '.[daemon]'
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing grainwatch, what it needs and the tools of development into $(VENV) (a few minutes and 1.7 GB of disk the first time)"
	@$(PIP) install -c constraints.txt -e '.[daemon,dev]'
	@touch $@
