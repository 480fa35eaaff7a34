# setup   .venv with the locked dependencies          demo    the whole story, live (ONCE=1: ends by itself)
# test    everything, on real parts of its own        bench   tests/benchmarks (NAME=… for one)
# lint    ruff, mypy, import-linter                   lock    the lock files, anew (needs uv)
# chaos   break everything at random (SECONDS=…, SEED=…; DEFECTS=1: it must find every mistake made on purpose; CONTROL=1: none
#         where there is none)
# docs    what is made from the program: settings, events, topics, API; refuses what would break a reader

SHELL := /bin/bash

# The first that is new enough; `make PYTHON=/path/to/python setup` picks another.
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))

LOCKS := requirements.lock requirements-build.lock
PIP := .venv/bin/python -m pip --disable-pip-version-check --no-input
COMPILE := uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11

.PHONY: setup demo test bench chaos lint lock docs

setup: .venv/installed

# The stamp is written last, so that an installation which was cut off is done again.
# --no-deps: the locks name everything; resolving again, pip asks for the newest of `coverage[toml]`, which they do not hash.
.venv/installed: $(LOCKS) pyproject.toml
	@$(if $(PYTHON),,echo "no Python 3.11 or newer found: install one, or run make PYTHON=/path/to/python" >&2; exit 1)
	@$(PYTHON) -m venv .venv
	@echo "Installing the locked dependencies into .venv; the first time takes a minute or two."
	@$(PIP) install --quiet --require-hashes --no-deps $(LOCKS:%=-r %)
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	@.venv/bin/stablerail demo $(if $(ONCE),--once)

# What stands between a company's own balances and the ledger: its tests run every line and every branch.
COVERED := ledger/legacy.py,ledger/shadow*.py,stablerail/shadow.py,agents/treasury/tell_legacy.py,ledger/funds.py,ledger/*orders.py,agents/investing/*

# Chaos first and alone: everything beside it would wait for it. Then three processes on two cores: much of the time a test
# waits for a broker, a block or a time-out.
test: setup
	@.venv/bin/python -m stablerail.dev.fetch
	@.venv/bin/python -m pytest -q -p no:cacheprovider tests/chaos/test_two_minutes.py
	@.venv/bin/python -m pytest -n 3 --ignore=tests/chaos/test_two_minutes.py --dist loadscope --no-loadscope-reorder --cov --cov-report=term:skip-covered --ignore=tests/benchmarks
	@missed=$$(.venv/bin/coverage report -m --include="$(COVERED)" --fail-under=100) || { echo "$$missed"; exit 1; }

bench: setup
	@.venv/bin/python -m stablerail.dev.fetch
	@.venv/bin/python -m tests.benchmarks $(NAME)

chaos: setup
	@.venv/bin/python -m stablerail.dev.fetch
	@.venv/bin/python -m tests.chaos $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(DEFECTS),--defects $(filter-out 1,$(DEFECTS))) $(if $(CONTROL),--control)

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

docs: setup
	@.venv/bin/python -m stablerail.docs

# The build back-end (and what it needs for --editable) is locked apart: it is no dependency of the product. What the image
# installs is the part of requirements.lock without extras.
lock:
	@command -v uv >/dev/null || { echo "uv is missing: pip install uv" >&2; exit 1; }
	@$(COMPILE) --all-extras pyproject.toml -o requirements.lock
	@$(COMPILE) --constraint requirements.lock pyproject.toml -o requirements-product.lock
	@.venv/bin/python -c 'import tomllib; print("editables", *tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		| $(COMPILE) --constraint requirements.lock -o requirements-build.lock -
