# make demo   the whole job on an embedded example, ending in a table and an HTML report
# make test   lint, types and tests
# Both make the environment first; it is made again only when pyproject.toml changes.

VENV ?= .venv
PYTHON ?= python3
DEMO ?= demo
PYTEST_ARGS ?= -n auto --dist loadfile

BIN := $(VENV)/bin
ROOMS := compress export runtimes devices deploy
TYPES := build/types/edgepack
# torch alone first: where a CPU build is at hand pip takes it and keeps it
TORCH := torch==2.13.0
# these name a torch build in their requirements that pip would replace ours by, or other versions than litert-torch
ZOO := torchvision==0.28.0 timm==1.0.31 brevitas==0.13.4 unfoldNd==0.2.3 dependencies==2.0.1

.PHONY: help setup demo test compiler check lint types slow clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(VENV)/dev.stamp

$(VENV)/run.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/python -m pip install --quiet --editable '.[all,dev]' 'transformers>=5.0'
	$(BIN)/python -m pip install --quiet --no-deps $(ZOO)
	touch $@

demo: $(VENV)/run.stamp
	test -f $(DEMO)/edgepack.toml || $(BIN)/edgepack init --quiet --example digits $(DEMO)
	$(BIN)/edgepack run $(DEMO)

test: compiler check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# without one the tests of C would be left out, and the others pass
compiler:
	@command -v cc > /dev/null || { echo "the tests need a C compiler: apt-get install gcc" >&2; exit 1; }

slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow

check: lint types

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# mypy does not follow the mapping of folders to edgepack.*, so it gets a tree of links that shows it
types: $(VENV)/dev.stamp
	@rm -rf $(TYPES) && mkdir -p $(TYPES) && ln -s $(addprefix $(CURDIR)/,$(wildcard core/*.py) core/py.typed core/models $(ROOMS)) $(TYPES)/
	MYPYPATH=build/types $(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
