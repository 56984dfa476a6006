# `make help` lists the targets. Each installs what it needs into .venv, from requirements*.txt and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := install $(shell test -t 2 || echo --quiet) --disable-pip-version-check --no-compile # what is imported is compiled then
# If that were not kept, as some images of Python have it, every process would take twice as long to start.
unexport PYTHONDONTWRITEBYTECODE
ARGS ?=
# PyPI's PyTorch brings gigabytes of CUDA. TORCH_INDEX=URL names PyTorch's own index of builds for CPUs (docs/faq.md says where
# it is listed); it is used where there is no NVIDIA driver.
TORCH_INDEX ?=
DRIVER := $(wildcard /proc/driver/nvidia/version)$(shell command -v nvidia-smi 2> /dev/null)
TORCH := $(if $(TORCH_INDEX),$(if $(DRIVER),,-c constraints-cpu.txt --extra-index-url $(TORCH_INDEX)))
HINT := "there is no NVIDIA driver here: TORCH_INDEX=URL installs PyTorch's build for CPUs, without gigabytes of CUDA (docs/faq.md)"
PYTEST := $(BIN)/python -m pytest $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help train test test-fast test-unit test-ray test-all lint types check format hooks docs bench clean

help: ## list the targets
	@echo "make TARGET [ARGS=...]    ARGS goes to the command that the target runs"; echo
	@sed -En 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  %-15s %s\n", $$1, $$2}'

train: .venv/installed ## meta-train on three real Atari games on this machine (two minutes after the install)
	$(BIN)/python launch.py train $(ARGS)

test: .venv/installed-dev ## what has to pass before anything lands: linters, types, the site, and every test but the slow ones
	$(MAKE) --no-print-directory --jobs 3 --output-sync=target lint types docs test-fast
	$(MAKE) --no-print-directory test-ray

test-fast: .venv/installed-dev ## tests without Ray
	$(PYTEST) -m "not ray and not slow" --numprocesses 2 --dist worksteal

test-unit: .venv/installed-dev ## tests with neither Ray nor an emulator
	$(PYTEST) -m "unit and not slow" --numprocesses 2 --dist worksteal

test-ray: .venv/installed-dev ## tests of the whole service on a real Ray, three side by side
	$(PYTEST) tests/driver -m "ray and not slow" --numprocesses 3 --dist loadgroup --no-loadscope-reorder

test-all: .venv/installed-extras ## before a release: the slow tests too, property tests with all their examples, and the site
	$(MAKE) --no-print-directory lint types
	$(PYTEST) -m "not ray" --hypothesis-profile full --numprocesses 2 --dist worksteal
	$(PYTEST) -m ray --hypothesis-profile full --numprocesses 3 --dist loadgroup --no-loadscope-reorder --ignore tests/driver/test_memory.py
	$(PYTEST) tests/driver/test_memory.py -m ray # alone, because it depends on the memory of the whole machine
	$(MAKE) --no-print-directory docs

check: lint types ## linters and type checker only

lint: .venv/installed-dev ## ruff: errors, style, docstrings, format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev ## check types with mypy --strict
	$(BIN)/mypy

format: .venv/installed-dev ## fix what ruff can fix by itself, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: .venv/installed-dev ## run the linters at every commit (pre-commit; nothing is downloaded)
	$(BIN)/pip $(PIP) pre-commit==4.7.0
	$(BIN)/pre-commit install

docs: .venv-docs/installed ## build the documentation in build/site, fail on a link that leads nowhere, and check CITATION.cff
	rm -rf build/pages && mkdir -p build/pages/tests
	cp -r README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md LICENSE docs cluster build/pages/
	cp tests/README.md build/pages/tests/
	find leap_dist -name "*.py" -exec cp --parents {} build/pages/ \;
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet
	.venv-docs/bin/cffconvert --validate

bench: .venv/installed .venv-sb3/installed .venv-rllib/installed ## agent steps per second beside Stable-Baselines3 and RLlib (an hour and a half)
	$(BIN)/python -m benchmarks.peers $(ARGS)

.venv/installed: requirements.txt constraints.txt
	@echo "installing the packages of requirements.txt into .venv (a minute, most of it for PyTorch)"
	$(if $(DRIVER)$(TORCH_INDEX),,@echo $(HINT))
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip $(PIP) -r requirements.txt $(TORCH)
	touch $@

.venv/installed-dev: requirements-dev.txt requirements.txt constraints.txt
	$(if $(DRIVER)$(TORCH_INDEX),,@echo $(HINT))
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip $(PIP) -r requirements-dev.txt $(TORCH)
	touch .venv/installed $@

.venv/installed-extras: requirements-extras.txt .venv/installed-dev
	$(BIN)/pip $(PIP) -r requirements-extras.txt $(TORCH)
	touch $@

.venv-docs/installed: requirements-docs.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip $(PIP) -r requirements-docs.txt
	touch $@

.venv-sb3/installed: requirements-bench.txt constraints.txt
	test -x .venv-sb3/bin/python || $(PYTHON) -m venv .venv-sb3
	.venv-sb3/bin/pip $(PIP) -r requirements-bench.txt $(TORCH)
	touch $@

.venv-rllib/installed: requirements-bench-rllib.txt constraints.txt
	test -x .venv-rllib/bin/python || $(PYTHON) -m venv .venv-rllib
	.venv-rllib/bin/pip $(PIP) -r requirements-bench-rllib.txt $(TORCH)
	touch $@

clean: ## remove environments and caches
	rm -rf .venv .venv-docs .venv-sb3 .venv-rllib build .pytest_cache .mypy_cache .ruff_cache .hypothesis
