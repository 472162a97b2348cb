# `make` alone lists the targets. Everything is installed outside the checkout on first use (tools/run says where).
SHELL := /bin/bash
.DEFAULT_GOAL := help
RUN := tools/run

.PHONY: help
help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## /\1\t/' | expand -t 18

.PHONY: setup
setup: ## install everything that demo and test need (they do it themselves, too)
	@tools/system-packages
	@$(RUN) python -m devcluster build
	@$(RUN) python -m devcluster.sandbox_python

.PHONY: demo
demo: setup ## the main job, end to end, on a real API server; YES=1 approves without asking
	@$(RUN) python -m devcluster.demo

.PHONY: test
test: setup ## every test that fits into 12 minutes
	@$(RUN) ruff format --check -q .
	@$(RUN) ruff check -q .
	@$(RUN) mypy
	@$(RUN) lint-imports --no-cache
	@$(RUN) pytest -q -n 3 --dist loadfile -m "not slow"

.PHONY: check
check: ## format, lint, types, import contracts and unit tests, in under a minute
	@$(RUN) ruff format -q .
	@$(RUN) ruff check -q .
	@$(RUN) mypy
	@$(RUN) lint-imports --no-cache
	@$(RUN) pytest -q -n 2 --dist loadfile tests/unit

.PHONY: quick
quick: ## unit and component tests only
	@$(RUN) pytest -q tests/unit tests/component

.PHONY: full
full: setup ## everything, the slow lanes included; AGENT_SANDBOX_SOURCE= names a checkout of agent-sandbox, KUBE_ROUTER= a kube-router program for their tests
	@$(RUN) python -m tests.support.agent_sandbox
	@$(RUN) pytest -q -n 3 --dist loadfile

.PHONY: bench
bench: setup ## measure latency, throughput and fan-out beside the machine's own limits
	@$(RUN) python -m devcluster.bench

.PHONY: bench-load
bench-load: setup ## measure 10,000 waiting Intents, 1,000 at once, and restarts of API server and PostgreSQL under load
	@$(RUN) python -m devcluster.bench load

SOAK := $(foreach name,KILLS STOPS ZOMBIES WORKERS TASKS PARALLELISM SEED SECONDS,$(if $($(name)),--$(shell tr A-Z a-z <<< $(name)) $($(name)))) $(if $(JSON),--json $(JSON))

.PHONY: fanout-soak
fanout-soak: setup ## 1,000 tasks of one Intent while workers are killed; fails unless each counts once; KILLS= STOPS= ZOMBIES= SEEDS= SEED= TASKS= PARALLELISM= WORKERS= SECONDS= JSON=
	@$(RUN) python -m devcluster.soak fanout $(SOAK) $(if $(SEEDS),--seeds $(SEEDS))

.PHONY: sandbox-soak
sandbox-soak: setup ## real sandboxes of all kinds, local and e2b, while workers and provider fail; as above, and PROVIDER=local, e2b or kubernetes (root)
	@$(RUN) python -m devcluster.soak sandbox $(SOAK) $(if $(PROVIDER),--provider $(PROVIDER))

.PHONY: up
up: setup ## a development cluster, PostgreSQL and the controller, in the background; CONTROLLER=0 leaves the controller out, NODE=1 adds a real node (root)
	@$(RUN) python -m devcluster up $(if $(filter 0,$(CONTROLLER)),--no-controller) $(if $(filter 1,$(NODE)),--node)

.PHONY: down
down: ## stop exactly what `make up` started; WIPE=1 removes its data, too
	@$(RUN) python -m devcluster down $(if $(filter 1,$(WIPE)),--wipe)

.PHONY: start
start: setup ## the controller in the foreground, on what `make up CONTROLLER=0` started
	@$(RUN) python -m devcluster start

.PHONY: oc-daemon-up
oc-daemon-up: setup ## an OpenCode daemon in the foreground, for `OC_MODE=live make start`; scripted model unless OC_MODEL_BASE_URL is set
	@$(RUN) python -m devcluster oc-daemon

.PHONY: db-reset
db-reset: ## empty our schema of `make up`'s database; refuses while Intents refer to it, unless FORCE=1
	@$(RUN) python -m devcluster db-reset $(if $(filter 1,$(FORCE)),--force)

.PHONY: db-sys-reset
db-sys-reset: ## empty DBOS' schema of `make up`'s database; refuses while Intents refer to it, unless FORCE=1
	@$(RUN) python -m devcluster db-reset --system $(if $(filter 1,$(FORCE)),--force)

.PHONY: golden-refresh
golden-refresh: ## write the golden files again (contracts of model and sandbox)
	@REFRESH_GOLDEN=1 $(RUN) pytest -q tests/unit -k golden

.PHONY: record
record: setup ## record OpenCode turns again: real daemon, scripted model (opencode/scenarios)
	@$(RUN) python -m opencode.record

.PHONY: lock
lock: ## resolve requirements/*.in again
	@$(RUN) uv pip compile -q --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 requirements/dev.in -o requirements/dev.lock
	@$(RUN) uv pip compile -q --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 -c requirements/dev.lock requirements/runtime.in -o requirements/runtime.lock

KIND_CLUSTER := sisu-kodo
KIND := --context kind-$(KIND_CLUSTER) -n sisu-kodo-system

.PHONY: kind-up
kind-up: ## the released form, for those who have Docker: kind cluster, image, chart; recorded plans, mock sandboxes
	@for tool in docker kind kubectl helm; do command -v $$tool >/dev/null || { echo "kind-up: $$tool is missing; 'make up' needs none of docker, kind, kubectl and helm" >&2; exit 1; }; done
	@docker info >/dev/null 2>&1 || { echo "kind-up: docker is installed, but its daemon does not answer; 'make up' does without" >&2; exit 1; }
	@kind get clusters 2>/dev/null | grep -qx $(KIND_CLUSTER) || kind create cluster --config kind-config.yaml --wait 120s
	docker build -t sisu-kodo:dev --build-arg REVISION=$$(git rev-parse HEAD) .
	kind load docker-image sisu-kodo:dev --name $(KIND_CLUSTER)
	@kubectl --context kind-$(KIND_CLUSTER) create namespace sisu-kodo-system --dry-run=client -o yaml | kubectl --context kind-$(KIND_CLUSTER) apply -f -
	kubectl $(KIND) apply -f charts/sisu-kodo/ci/kind-postgres.yaml
	kubectl $(KIND) rollout status deployment/sisu-kodo-postgres --timeout=300s
	helm upgrade --install sisu-kodo charts/sisu-kodo --kube-context kind-$(KIND_CLUSTER) -n sisu-kodo-system -f charts/sisu-kodo/ci/kind-values.yaml --wait --timeout 5m
	@# The tag does not change between builds, so a second kind-up needs a restart.
	kubectl $(KIND) rollout restart deployment/sisu-kodo-controller
	kubectl $(KIND) rollout status deployment/sisu-kodo-controller --timeout=180s

.PHONY: kind-down
kind-down: ## delete the cluster of kind-up
	@command -v kind >/dev/null || { echo "kind-down: kind is missing" >&2; exit 1; }
	kind delete cluster --name $(KIND_CLUSTER)
