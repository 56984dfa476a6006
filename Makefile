# make train   meta-train on three real Atari games on this machine (about two minutes after the install)
# make test    the whole test suite and the linters
# make bench   agent steps per second beside Stable-Baselines3 and RLlib (an hour and a half after the installs)
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: train test lint types bench clean

train: .venv/installed
	$(BIN)/python launch.py train --preset quick $(ARGS)

test: .venv/installed-dev lint types
	$(BIN)/python -m pytest -m "not ray" --numprocesses 2 --dist worksteal
	$(BIN)/python -m pytest -m ray --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

bench: .venv/installed .venv-sb3/installed .venv-rllib/installed
	$(BIN)/python -m benchmarks.peers $(ARGS)

.venv/installed: requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv-sb3/installed: requirements-bench.txt constraints.txt
	test -x .venv-sb3/bin/python || $(PYTHON) -m venv .venv-sb3
	.venv-sb3/bin/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	touch $@

.venv-rllib/installed: requirements-bench-rllib.txt constraints.txt
	test -x .venv-rllib/bin/python || $(PYTHON) -m venv .venv-rllib
	.venv-rllib/bin/pip install --quiet --disable-pip-version-check -r requirements-bench-rllib.txt
	touch $@

clean:
	rm -rf .venv .venv-sb3 .venv-rllib .pytest_cache .mypy_cache .ruff_cache .hypothesis
