# SPDX-License-Identifier: Apache-2.0
# `make quickstart` and `make test` are complete on a fresh machine: Python 3.11+ and a package registry.

PYTHON ?= python3
# Many tests wait, for processes, disks and leases: three at a time keep two cores busy. Each takes neighbours, which share
# what a module sets up, and then from whoever has most left.
PYTEST_ARGS ?= -n 3 --dist worksteal
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-postgres test-s3 check format schema composition

help:
	@echo "make setup         make .venv with everything that running and testing Hansa needs"
	@echo "make quickstart    set up, then run the main job: hansa quickstart"
	@echo "make test          set up, then run the tests"
	@echo "make test-postgres set up, then run the server's tests on a PostgreSQL of their own (Debian: postgresql)"
	@echo "make test-s3       set up, install moto's S3 server beside it, then run the tests of files that go there"
	@echo "make check         set up, then run formatter, linter, strict type checker and import-linter"
	@echo "make format        set up, then format and mend what the linter can"
	@echo "make schema        set up, then write docs/job.schema.json from the job's model"
	@echo "make composition   set up, then write docs/composition.md from the rules of what goes with what"

setup: .venv/.ready

# PIP_FIND_LINKS, where a machine sets it, names a folder of wheels that pip would use; uv is told of it too.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv==0.13.8
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" \
		$(BIN)/uv pip install -q --python $(BIN)/python -e '.[dev]' -c constraints.txt
	@touch $@

quickstart: setup
	$(BIN)/hansa quickstart

# The tests start hundreds of processes: where the surroundings forbid bytecode, each would compile its libraries anew.
test: setup
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-postgres: setup
	$(BIN)/python -m pytest -m postgres -rs tests/server

# moto imitates S3's protocol; its many dependencies stay out of the environment that is tested.
test-s3: setup
	$(PYTHON) -m venv .venv/s3
	.venv/s3/bin/python -m pip install -q 'moto[server]==5.*'
	HANSA_TEST_S3_SERVER=.venv/s3/bin/moto_server $(BIN)/python -m pytest -rs tests/server/test_blobs.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

schema: setup
	$(BIN)/python -c 'import json; from hansa.core import config; print(json.dumps(config.schema(), indent=2))' \
		> docs/job.schema.json

composition: setup
	$(BIN)/python -m hansa.runs.composition > docs/composition.md
