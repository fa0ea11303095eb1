# Every target makes its own .venv on a fresh machine; nothing is installed outside of it.
# PYTHON picks the interpreter (3.11 or newer) that the environment is made with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?= -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test lint types imports docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.user  ## train a small net, compress it, write the report
	$(BIN)/pared demo

test: $(VENV)/.developer  ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.developer  ## ruff
	$(BIN)/ruff check .

types: $(VENV)/.developer  ## mypy
	$(BIN)/mypy

imports: $(VENV)/.developer  ## which room may import which
	PYTHONPATH=src $(BIN)/lint-imports

docs: $(VENV)/.developer  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove the environment and everything built
	rm -rf $(VENV) site dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# torch first and pinned, so that no later package brings another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/.user: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

# timm names torchvision, whose compiled half fits one build of torch only: both without their dependencies.
$(VENV)/.developer: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,docs,onnx,train,samples,hub,language]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps timm torchvision
	touch $@ $(VENV)/.user
