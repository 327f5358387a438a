# PredictFlow's targets. Each sets itself up: a private .venv from the committed lock file, nothing global.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# Feast, MLflow and DVC take several times as long to import when their bytecode may not be kept.
unexport PYTHONDONTWRITEBYTECODE

# The first interpreter on PATH that runs and is 3.11 or 3.12; override with `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && { echo $$p; break; }; done)
UV := .venv/bin/uv
UV_VERSION := 0.13.8
PF := .venv/bin/predictflow
DATA ?=
DEMO_ARGS ?=
SIZE ?= small
MINUTES ?= 30
FEAST_SOURCE ?=
EXAMPLES ?= 500
READS ?= 1000000
SEED ?= 2
KILLS ?= 200
PYTEST_ARGS ?=

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*?## "} {printf "  make %-14s %s\n", $$1, $$2}'

.venv/bin/uv:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 on PATH; install one, or run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.venv/.runtime: requirements.lock pyproject.toml | .venv/bin/uv
	$(UV) pip install --quiet --python .venv --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation -e .
	@touch $@

.venv/.dev: requirements-dev.lock .venv/.runtime
	$(UV) pip install --quiet --python .venv --require-hashes -r requirements-dev.lock
	@touch $@

.PHONY: install
install: .venv/.runtime ## Install the platform into .venv from requirements.lock

.PHONY: install-dev
install-dev: .venv/.dev ## Install the test and lint tools too

.PHONY: demo
demo: .venv/.runtime ## Run the whole platform end to end (DATA=path/to/online_retail.csv.gz for real data)
	@$(PF) demo $(if $(DATA),--data "$(DATA)") $(DEMO_ARGS)

.PHONY: up
up: .venv/.runtime ## Start private Postgres, Redis and Kafka
	@$(PF) up

.PHONY: down
down: .venv/.runtime ## Stop everything that up or demo started; data stays
	@$(PF) down

.PHONY: status
status: .venv/.runtime ## Show what runs, and where
	@$(PF) status

.PHONY: test
test: .venv/.dev ## Run the tests against real Postgres, Redis and Kafka
	.venv/bin/python -m pytest -n 2 --dist loadfile -m "not long" $(PYTEST_ARGS)

.PHONY: test-long
test-long: .venv/.dev ## Run the tests that `make test` leaves out for their time: planted faults, killed servers, more demos
	.venv/bin/python -m pytest -n 2 --dist loadfile -m long $(PYTEST_ARGS)

.PHONY: lint
lint: .venv/.dev ## Run ruff, mypy and the import-direction check
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

.PHONY: bench-offline
bench-offline: .venv/.dev ## Measure the offline store against stock Feast and hand-written queries (SIZE=small|full)
	.venv/bin/python -m benchmarks.offline --size $(SIZE)

.PHONY: bench-online
bench-online: .venv/.dev ## Measure the servers and the online store against feast serve, feast listen and the SDK (SIZE=small|full)
	.venv/bin/python -m benchmarks.online --size $(SIZE)

.PHONY: bench-stream
bench-stream: .venv/.dev ## Measure the stream on a real broker: events per CPU-second, freshness, state (SIZE=small|full)
	.venv/bin/python -m benchmarks.stream --size $(SIZE)

.PHONY: soak-online
soak-online: .venv/.dev ## Mixed load on predictflow serve for MINUTES (30) while Redis restarts five times
	.venv/bin/python -m benchmarks.soak --minutes $(MINUTES)

.PHONY: prove-backfill
prove-backfill: .venv/.dev ## Kill a backfill 50 times at random points; the result must be the same bytes
	PREDICTFLOW_BACKFILL_KILLS=50 .venv/bin/python -m pytest tests/integration/test_backfill_kill.py

.PHONY: prove-windows
prove-windows: .venv/.dev ## Compare stream, history and an oracle over READS (1000000) random reads of windowed views (SEED=2)
	PREDICTFLOW_PROOF_READS=$(READS) PREDICTFLOW_PROOF_SEED=$(SEED) .venv/bin/python -m pytest tests/windows_proof --timeout 14400

.PHONY: prove-stream
prove-stream: .venv/.dev ## Kill consumers of a real broker and Redis KILLS (200) times at random; online must equal history
	PREDICTFLOW_STREAM_KILLS=$(KILLS) PREDICTFLOW_STREAM_SEED=$(SEED) .venv/bin/python -m pytest tests/integration/test_sync_kills.py --timeout 28800

.PHONY: fuzz-rest
fuzz-rest: .venv/.dev ## Send the REST server requests made from its OpenAPI document, with new seeds (EXAMPLES=500 per route)
	PREDICTFLOW_FUZZ_EXAMPLES=$(EXAMPLES) .venv/bin/python -m pytest tests/integration/test_rest_fuzz.py --timeout 7200

.venv-feast/.done: requirements.lock requirements-dev.lock tests/feast_universal/requirements.txt | .venv/.dev
	$(UV) venv --quiet --clear --python .venv/bin/python .venv-feast
	$(UV) pip install --quiet --python .venv-feast --require-hashes -r requirements-dev.lock
	$(UV) pip install --quiet --python .venv-feast -c requirements.lock -r requirements.lock -r tests/feast_universal/requirements.txt
	$(UV) pip install --quiet --python .venv-feast --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: feast-universal
feast-universal: .venv-feast/.done ## Run Feast's own store tests on ours (FEAST_SOURCE=path of a Feast source checkout)
	.venv-feast/bin/python tests/feast_universal/run.py "$(FEAST_SOURCE)"

.PHONY: format
format: .venv/.dev ## Format the code
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

.PHONY: docs
docs: .venv/.dev ## Write docs/reference/cli.md from the commands' own --help
	.venv/bin/python -m predictflow.help_pages

.PHONY: lock
lock: .venv/bin/uv ## Resolve the dependencies again into the two lock files
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" pyproject.toml -o requirements.lock
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" pyproject.toml --group dev --group bench -c requirements.lock -o requirements-dev.lock
