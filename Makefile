# Every command of the project, once. CI and Jenkins call these targets and nothing else.
# `make` prints this list.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= en-moonshine-tiny
# Where nobody named a model, a program takes its own.
NAMED_MODEL = $(if $(filter file,$(origin MODEL)),,--model "$(MODEL)")
RETRY ?= 0
TORCH := torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

# --- environments ------------------------------------------------------------------------------------
# One virtual environment; each stamp adds a group to it. Hashes are checked; nothing outside the locks is taken.
$(VENV)/bin/python:
	@scripts/make_venv.sh "$(PYTHON)" "$(VENV)"

$(VENV)/.packages: requirements/api.txt requirements/ui.txt pyproject.toml | $(VENV)/bin/python
	@scripts/install.sh "$(VENV)" api ui
	@touch $@

$(VENV)/.run: $(VENV)/.packages | kernels
	@touch $@

$(VENV)/.training: $(VENV)/.run requirements/training.txt
	@scripts/install.sh "$(VENV)" training "$(TORCH)"
	@touch $@

$(VENV)/.dev: $(VENV)/.training requirements/dev.txt
	@scripts/install.sh "$(VENV)" dev
	@touch $@

$(VENV)/.bench: $(VENV)/.run requirements/bench.txt
	@scripts/install.sh "$(VENV)" bench
	@touch $@

# Whatever needs the service asks for them each time: a compiler may have come since.
.PHONY: kernels
kernels: | $(VENV)/.packages ## compile INT8 kernels and decoders where there is a C compiler and they are not of today's source
	@$(BIN)/python api/kernels/build.py
	@$(BIN)/python -m api.compiled.build

.PHONY: setup lock
setup: $(VENV)/.dev ## the environment with every group
lock: ## resolve the locks again (needs uv)
	requirements/lock.sh

# --- run and test ------------------------------------------------------------------------------------
.PHONY: run test lint format
run: $(VENV)/.run ## set up, start API and page, transcribe a sample; MODEL=name serves another bundle
	@exec $(BIN)/python scripts/run.py $(NAMED_MODEL) $(ARGS)

# Only after a whole run: one that broke off has its failures too, and says nothing of the tests that never ran.
test: $(VENV)/.dev ## set up and run every test, in two processes; ARGS=..., RETRY=1 runs what failed once more
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 2 $(ARGS) || { \
	  status=$$?; [ "$$status $(RETRY)" = "1 1" ] || exit $$status; \
	  echo "=== some tests failed; those again, once ==="; \
	  $(BIN)/python -m pytest -q --last-failed --last-failed-no-failures none; }

.PHONY: train-smoke
train-smoke: $(VENV)/.dev ## all five recipes, from recordings to bundles that a live API serves
	$(BIN)/python -m pytest -q --durations=0 tests/training/test_train_smoke.py

lint: $(VENV)/.dev ## ruff and mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff format and mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --- measure ------------------------------------------------------------------------------------------
.PHONY: bench bench-wer bench-peers
bench: $(VENV)/.bench ## speed of the service against its own engine; MODEL=name, ARGS=...
	$(BIN)/python -m loadtest.bench --model "$(MODEL)" $(ARGS)

bench-wer: $(VENV)/.bench $(VENV)/.training ## word error rate on ../shared/speech/test, with the teacher and pocketsphinx
	$(BIN)/python -m training.bench_wer $(ARGS)

bench-peers: $(VENV)/.bench $(VENV)/.training ## the same weights through this service, naive servers and sherpa-onnx
	$(BIN)/python -m loadtest.bench_peers $(ARGS)

# --- observe (docs/observability.md) ------------------------------------------------------------------
.PHONY: check-monitoring demo-incident bench-telemetry
check-monitoring: $(VENV)/.dev ## rules, alerts, runbooks and dashboards as files: promtool, amtool and our own checks
	$(BIN)/python -m pytest -q tests/monitoring/test_files.py tests/monitoring/test_runbooks.py

demo-incident: $(VENV)/.dev ## overload on loopback: alerts fire in Prometheus and Alertmanager, and resolve
	$(BIN)/python -m loadtest.demo_incident --model "$(MODEL)" $(ARGS)

bench-telemetry: $(VENV)/.bench ## what traces, metrics and logs cost, in pairs; MODEL=name, ARGS=...
	$(BIN)/python -m loadtest.bench_telemetry --model "$(MODEL)" $(ARGS)

.PHONY: bench-decoder bench-engine bench-kernels bench-live bench-overload
bench-decoder: $(VENV)/.bench ## greedy and beam search with 0 to 1,000 hotwords; MODEL=name
	$(BIN)/python -m loadtest.bench_decoder $(NAMED_MODEL) $(ARGS)

bench-engine: $(VENV)/.bench ## engine in process: workers, threads, batch; MODEL=name
	$(BIN)/python -m loadtest.bench_engine --model "$(MODEL)" $(ARGS)

bench-kernels: $(VENV)/.bench ## our kernels against ONNX Runtime's own, and time by operator; MODEL=name
	$(BIN)/python -m loadtest.bench_kernels $(NAMED_MODEL) $(ARGS)

bench-live: $(VENV)/.bench ## how soon live sessions have their text, and how many a machine carries; MODEL=name, ARGS="--sessions 1,16"
	$(BIN)/python -m loadtest.bench_live --model "$(MODEL)" $(ARGS)

bench-overload: $(VENV)/.bench ## three times capacity for two minutes; MODEL=name, ARGS="--seconds 30"
	$(BIN)/python -m loadtest.overload --model "$(MODEL)" $(ARGS)

.PHONY: fuzz-audio simulate-capacity soak
fuzz-audio: $(VENV)/.bench ## 100,000 damaged files through the decoder, in a child that may die; ARGS="--count 2000"
	$(BIN)/python -m loadtest.fuzz_audio $(ARGS)

soak: $(VENV)/.bench ## 30 minutes of mixed load: no memory, descriptor, thread or file may stay; ARGS="--minutes 480 --out build/soak"
	$(BIN)/python -m loadtest.soak --model "$(MODEL)" $(ARGS)

simulate-capacity: $(VENV)/.bench ## how long requests queue at which load, how many replicas a load needs; MODEL=name
	$(BIN)/python -m loadtest.capacity --model "$(MODEL)" $(ARGS)

# --- ship: images, Compose, Kubernetes (docs/deploy.md) ------------------------------------------------
INFRA := .venv-infra
VERSION ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REGISTRY ?=
# A registry takes lower case only, and a repository's owner may have capitals.
override REGISTRY := $(shell tr '[:upper:]' '[:lower:]' <<<'$(REGISTRY)')
REGISTRY_PREFIX := $(if $(REGISTRY),$(REGISTRY)/)
OVERLAY ?= production
REPLICAS ?= 3
URL ?=
CACHE ?=
AUDIT_STRICT ?= 0
export REGISTRY REPLICAS
export TRIVY_IMAGE ?= aquasec/trivy:0.69.3@sha256:bcc376de8d77cfe086a917230e818dc9f8528e3c852f7b1aff648949b6258d1c

$(INFRA)/.done: requirements/infra.txt
	@scripts/make_venv.sh "$(PYTHON)" "$(INFRA)"
	$(INFRA)/bin/pip install -q --require-hashes -r requirements/infra.txt
	@touch $@

.PHONY: ci lint-infra terraform-validate images image-api image-ui image-training image-lambda sbom audit scan registry-login registry-logout push sign
ci: ## what a clean runner does: system packages, then every test
	.ci/run

lint-infra: $(INFRA)/.done ## workflows, Dockerfiles, shell, YAML, Kubernetes, Terraform, Jenkinsfile
	tests/infra/lint.sh

terraform-validate: ## init and validate terraform/ (fetches the providers)
	terraform -chdir=terraform init -backend=false -input=false
	terraform -chdir=terraform validate

images: image-api image-ui ## build the images that are deployed (image-training, image-lambda: the others); CACHE=gha uses the runner's build cache
image-api image-ui image-training image-lambda: image-%:
	MODEL=$(MODEL) VERSION=$(VERSION) CACHE=$(CACHE) docker/build.sh $* $(REGISTRY_PREFIX)asr-$*

sbom: ## build/sbom/: what is inside the images, as CycloneDX
	@mkdir -p build/sbom
	@for kind in api ui; do docker run --rm --network none --volume "$(CURDIR)/docker/sbom.py:/sbom.py:ro" --entrypoint python3 \
	  $(REGISTRY_PREFIX)asr-$$kind:$(VERSION) /sbom.py asr-$$kind $(VERSION) > build/sbom/$$kind.cdx.json && echo build/sbom/$$kind.cdx.json; done

audit: $(INFRA)/.done ## known vulnerabilities in every lock; AUDIT_STRICT=1 fails where the database does not answer
	AUDIT_STRICT=$(AUDIT_STRICT) scripts/audit.sh

scan: $(INFRA)/.done ## known vulnerabilities in the images and what is locked for them
	docker/scan.sh $(VERSION)

registry-login: ## with REGISTRY_USER and REGISTRY_PASSWORD
	@docker login --username "$$REGISTRY_USER" --password-stdin $(firstword $(subst /, ,$(REGISTRY))) <<<"$$REGISTRY_PASSWORD"
registry-logout:
	@$(if $(REGISTRY),docker logout $(firstword $(subst /, ,$(REGISTRY))),true)

push: ## push the images under REGISTRY, tagged with VERSION
	@test -n "$(REGISTRY)" || { echo "error: name a REGISTRY" >&2; exit 1; }
	PUSH=1 $(MAKE) images
sign: ## sign what was pushed, by digest, and attach the bill of materials
	docker/sign.sh $(REGISTRY)

.PHONY: up down deploy-compose rollback-compose recover-compose forget-images scale-compose deploy-k8s rollback-k8s monitoring-k8s smoke smoke-k8s e2e e2e-k8s e2e-lambda sizing pin-images check-version github-release
up: ## the whole stack on this machine with Compose; REPLICAS=3
	docker/make_env.sh
	ASR_API_IMAGE=$(REGISTRY_PREFIX)asr-api:$(VERSION) ASR_UI_IMAGE=$(REGISTRY_PREFIX)asr-ui:$(VERSION) docker/compose.sh up --detach --scale api=$(REPLICAS)
	docker/deploy.sh keep $(VERSION)
down: ## stop it; volumes stay
	docker/compose.sh down

deploy-compose: ## this version to Compose here, replica by replica, back on failure
	docker/deploy.sh deploy $(VERSION)
rollback-compose: ## the version before
	docker/deploy.sh rollback
recover-compose: # take back a deployment that was broken off, if one was
	docker/deploy.sh recover
forget-images: # of VERSION, unless it is deployed here or would be gone back to
	docker/deploy.sh forget $(VERSION)
scale-compose: ## more or fewer replicas of the version that runs; REPLICAS=5
	docker/deploy.sh scale

deploy-k8s: ## this version to the cluster of KUBECONFIG, or else Terraform's
	k8s/setup.sh --overlay $(OVERLAY) --tag $(VERSION) $(if $(REGISTRY),--registry $(REGISTRY)) $(if $(KUBECONFIG),--kubeconfig '$(KUBECONFIG)',--skip-terraform)
rollback-k8s: ## what the last deploy-k8s changed, back to the revisions before it
	k8s/rollback.sh $(if $(KUBECONFIG),--kubeconfig '$(KUBECONFIG)')
monitoring-k8s: ## Prometheus, Grafana and Jaeger on the cluster of KUBECONFIG, or else Terraform's
	k8s/monitoring-setup.sh $(if $(KUBECONFIG),--kubeconfig '$(KUBECONFIG)')

smoke: ## ask for a transcription, and for the page, where .env publishes them; URL=http://... asks that service
	URL='$(URL)' docker/smoke.sh compose
smoke-k8s: ## the same of what deploy-k8s deployed, through its load balancer, or forwarded where it has none
	URL='$(URL)' docker/smoke.sh kubernetes

e2e: $(VENV)/.run ## proof on a real Docker: replicas, rolling restart and kill -9 under load
	$(BIN)/python -m tests.e2e_docker.compose_e2e
e2e-k8s: $(VENV)/.run ## the same on a real Kubernetes API server and kubelet
	$(BIN)/python -m tests.e2e_docker.kube_e2e
e2e-lambda: $(VENV)/.dev ## the Lambda image on a real Docker, invoked as Lambda does; start, event times, memory
	$(BIN)/python -m tests.e2e_docker.lambda_e2e

sizing: $(VENV)/.run ## what one replica with one CPU serves (after make e2e)
	$(BIN)/python -m tests.e2e_docker.sizing

pin-images: ## renew the digests of third-party images
	docker/pin_images.sh
check-version: # TAG must be the version in pyproject.toml
	@test "$(TAG)" = "v$(VERSION)" || { echo "error: tag $(TAG) is not v$(VERSION)" >&2; exit 1; }
github-release: # needs gh and GH_TOKEN
	gh release create "$(TAG)" --verify-tag --generate-notes build/sbom/api.cdx.json build/sbom/ui.cdx.json
