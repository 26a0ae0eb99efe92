# `make demo` and `make test` set up everything on a fresh machine: a virtual environment in $(VENV), the exact
# versions of constraints.txt, this tree in editable mode.
PYTHON ?= python3
VENV ?= .venv
# Options for installing torch, such as --index-url with PyTorch's CPU wheels, which are a tenth of the size.
TORCH_ARGS ?=
# A worker for each core. Each begins with an equal part of the tests, in their order, and one that is done takes over
# from the end of what another has left: suites share compiled models and keep together, but for two or three.
PYTEST_ARGS ?= -n auto --dist worksteal
# Which part of the second ring `make test-shard` runs, and for how long.
COMMIT ?= $(shell git rev-parse HEAD)
LIMIT ?= 600
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: demo test test-all test-shard lint docs clean

demo: $(VENV)/.installed
	$(VENV)/bin/mpqc demo --overwrite

# The first ring: everything that is small, and a sample of every larger suite (tests/README.md).
test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) --ring 1

test-all: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-shard: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) --ring 2 --shard $(COMMIT) --seconds $(LIMIT)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/python -m tests.harness.any_count

# The documentation as a site, in build/site. The variable keeps a notice of mkdocs-material's about mkdocs 2 quiet.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --strict
	@echo "build/site/index.html"

$(VENV)/.installed: setup.cfg constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt $(TORCH_ARGS) torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev,bench,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
