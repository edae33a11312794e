# One virtual environment, the versions that were tested, four commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install study test test-cluster test-fast lint format docs clean

help:
	@echo "make study      run studies/weight_search.yaml: 9 minutes on 2 cores, no accelerator, no model hub"
	@echo "make test       lint, types and every test but those of make test-cluster"
	@echo "make test-cluster  a real ray up on hosts of the test's own: root, iproute2, openssh-server, rsync"
	@echo "make test-fast  lint, types and the tests that need neither Ray nor hosts of their own"
	@echo "make format     format the code"
	@echo "make docs       the documentation as a site, build/site/index.html; warnings are errors"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "raydisp needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[test]"
	touch $@

study: install
	$(BIN)/python -m raydisp.study studies/weight_search.yaml

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not cluster"

test-cluster: install
	$(BIN)/python -m pytest -m cluster

test-fast: lint
	$(BIN)/python -m pytest -m "not ray and not processes and not cluster"

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/python -m raydisp.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
