# Every target does all its set-up: nothing is needed but Python 3.11 or newer and make.
#   make PYTHON=/path/to/python3.12 test     picks the interpreter the environment is made with

VENV ?= .venv
BENCH_VENV ?= .venv-bench
PYTHON ?=
PYTEST_ARGS ?=

SHELL := /bin/sh
bin := $(VENV)/bin
ready := $(VENV)/.installed
bench_ready := $(BENCH_VENV)/.installed
pip := -m pip --disable-pip-version-check install
# The torch that `make lock` starts from; another one by `make lock TORCH=2.14.0`.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test slow lint types properties bench figures lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(ready) ## prepare the demo corpus and train on it with two workers while a policy moves the weights
	$(bin)/mixer prepare configs/demo.yaml
	$(bin)/mixer train configs/demo.yaml

# The second run may find no test to run (pytest's 5): that is no failure of the first.
test: $(ready) ## all tests, the fast ones first
	$(bin)/python -m pytest -m "not ray and not slow" $(PYTEST_ARGS)
	$(bin)/python -m pytest -m "ray and not slow" $(PYTEST_ARGS) || test $$? -eq 5

slow: $(ready) ## the tests that take minutes: the parts of the benches, ...
	$(bin)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(ready) ## ruff: rules and format
	$(bin)/python -m ruff check .
	$(bin)/python -m ruff format --check .

types: $(ready) ## pyright: strict in mixer/core, basic elsewhere
	$(bin)/python -m pyright --pythonpath $(bin)/python

properties: $(ready) ## the property tests with 5,000 examples each
	MIXER_HYPOTHESIS_PROFILE=thorough $(bin)/python -m pytest -m hypothesis $(PYTEST_ARGS)

bench: $(bench_ready) ## measure against other systems, in an environment of their own
	$(BENCH_VENV)/bin/python -m tests.bench.run

figures: $(ready) ## every recorded figure as one table, unmet targets first
	@$(bin)/python -m tests.bench.figures

lock: ## write constraints.txt anew from what installs today
	@$(call make_venv,.venv-lock)
	.venv-lock/bin/python $(pip) torch==$(TORCH)
	.venv-lock/bin/python $(pip) '.[dev]'
	@{ sed -n '/^#/p' constraints.txt; \
	   .venv-lock/bin/python -m pip freeze --exclude mixer | sed 's/+[A-Za-z0-9.]*$$//' \
	     | grep '^[A-Za-z0-9._-]*==' | grep -viE '^(nvidia|cuda|triton)'; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@rm -rf .venv-lock
	@echo "constraints.txt: $$(grep -c == constraints.txt) packages"

clean: ## remove environments, caches and what the demo made
	rm -rf .venv .venv-bench .venv-lock .venv-ci build dist data runs mlruns
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find mixer jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is finished when its stamp exists, and the stamp is written last; one that was left half
# done is made anew. torch comes first and alone, so that a build for the machine which pip's own settings
# offer (a CPU wheel in find-links, say) is taken and not replaced.
$(ready): pyproject.toml constraints.txt
	@$(call make_venv,$(VENV))
	@rm -f $@
	$(bin)/python $(pip) torch==$(TORCH)
	$(bin)/python $(pip) -c constraints.txt -e '.[dev]'
	@touch $@

$(bench_ready): pyproject.toml constraints.txt tests/bench/constraints.txt
	@$(call make_venv,$(BENCH_VENV))
	@rm -f $@
	$(BENCH_VENV)/bin/python $(pip) torch==$(TORCH)
	$(BENCH_VENV)/bin/python $(pip) -c tests/bench/constraints.txt -e '.[bench]' pytest
	@touch $@

# $(call make_venv,FOLDER): a virtual environment, unless a finished one is there.
define make_venv
set -e; \
if [ -e $(1)/.installed ] && $(1)/bin/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
found=; \
for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
    found="$$python"; break; \
  fi; \
done; \
if [ -z "$$found" ]; then \
  if [ -n "$(PYTHON)" ]; then \
    echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1); needed is Python 3.11 or newer. Name one: make PYTHON=/path/to/python3.11" >&2; \
  else \
    echo "make: found no Python 3.11 or newer (tried python3.11, python3.12, python3.13, python3). Install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
  fi; \
  exit 1; \
fi; \
if ! "$$found" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
  echo "make: $$found cannot make virtual environments: its venv or ensurepip module is missing. On Debian and Ubuntu: apt install python3-venv (or the python3.x-venv of that version)." >&2; \
  exit 1; \
fi; \
echo "making $(1) with $$("$$found" --version), once; this takes some minutes"; \
"$$found" -m venv --clear $(1)
endef
