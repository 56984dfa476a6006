# make train   meta-train on three real Atari games on this machine (a few minutes after the install)
# make test    the whole test suite and the linters
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: train test lint types clean

train: .venv/installed
	$(BIN)/python launch.py train --preset quick $(ARGS)

test: .venv/installed-dev lint types
	$(BIN)/python -m pytest -m "not ray" --numprocesses 2 --dist worksteal
	$(BIN)/python -m pytest -m ray

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

.venv/installed: requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
