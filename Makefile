# `make demo` and `make test` set up everything on a fresh machine: a virtual environment in $(VENV), the exact
# versions of constraints.txt, this tree in editable mode.
PYTHON ?= python3
VENV ?= .venv
# Options for installing torch, such as --index-url with PyTorch's CPU wheels, which are a tenth of the size.
TORCH_ARGS ?=
# A worker for each core; suites keep together, since their tests share compiled models.
PYTEST_ARGS ?= -n auto --dist loadfile
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/mpqc demo --overwrite

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/.installed: setup.cfg constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt $(TORCH_ARGS) torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev,bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
