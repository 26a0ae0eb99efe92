# `make demo` and `make test` set up everything on a fresh machine: a virtual environment in $(VENV), the exact
# versions of constraints.txt, this tree in editable mode.
PYTHON ?= python3
VENV ?= .venv
# CPU builds of torch; where this index cannot be reached pip falls back to its own (on PyPI: a larger CUDA build).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/mpqc demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/.installed: setup.cfg constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --retries 1 --no-deps -c constraints.txt --extra-index-url $(TORCH_INDEX) torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev,bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
