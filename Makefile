# `make serve` and `make test` are all a newcomer needs: each makes .venv first, once.
#
#   make serve ARGS="--port 9000"        arguments of `megpt serve`
#   make test ARGS="-m slow -k paged"    arguments of pytest
#   make test JOBS=0                     in one process, say for a debugger
#   make venv PYTHON=python3.12          another interpreter (3.11 or newer)
#   make venv TORCH_INDEX_URL=...        another package index for torch, such as PyTorch's CPU-only one
#                                        (its install page gives the address): the default build for
#                                        Linux on x86 is the CUDA one, several GB larger

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV ?= .venv
PYTHON ?=
TORCH_INDEX_URL ?=
ARGS ?=
# Processes that share the tests; each uses about one core.
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input --prefer-binary
# Waiting OpenMP threads must not burn the cores of other workers; tests and benchmarks rely on it too.
export OMP_WAIT_POLICY ?= PASSIVE

FIND_PYTHON := for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python); do \
	if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		found="$$candidate"; break; fi; done

.PHONY: help venv serve test check lint types layers format bench peers docker clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make .venv with the project and its development tools

serve: $(STAMP) ## Serve the bundled model on http://127.0.0.1:8000
	@$(BIN)/megpt serve $(ARGS)

test: $(STAMP) ## Run the tests (CPU, offline)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

check: lint types layers ## All static checks: lint and formatting, types, import layers

lint: $(STAMP) ## Lint and formatting (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Types (mypy, strict)
	$(BIN)/mypy

layers: $(STAMP) ## Import layers (import-linter)
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## Apply the formatter and the linter's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure against the peers that are installed; results in benchmarks/results
	@$(BIN)/python -m benchmarks.cpu $(ARGS)

peers: $(STAMP) ## Install the peers that `make bench` compares with (compiles llama.cpp: minutes)
	$(PIP_INSTALL) -c constraints.txt -e '.[dev,peers]'

docker: ## Build the container image
	docker build --tag memory-efficient-gpt $(if $(TORCH_INDEX_URL),--build-arg TORCH_INDEX_URL="$(TORCH_INDEX_URL)") .

clean: ## Remove .venv and caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# torch goes first and alone: nothing installed later may bring another build of it.
$(STAMP): pyproject.toml constraints.txt
	@found=; $(FIND_PYTHON); \
	if [ -z "$$found" ]; then \
		echo "Python 3.11 or newer is needed; $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1 || true)." >&2; \
		echo "Name one with: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11" >&2; \
		exit 1; fi; \
	echo "[1/3] Making $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv $(VENV)
	@echo "[2/3] Installing $(TORCH): the largest download, a few minutes"
	@$(PIP_INSTALL) $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)") $(TORCH)
	@echo "[3/3] Installing the project, what it needs and its development tools"
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Ready: $(VENV)"
