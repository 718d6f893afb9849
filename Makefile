# make help says what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# What is tested: pyproject.toml has the ranges. torch is installed first, by itself, so that the version and build
# that a machine has at hand is taken and nothing pulls another.
TORCH ?= torch==2.13.0
PINS := diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 huggingface-hub==2.4.0 safetensors==0.8.0 \
	pandas==3.1.1 pyarrow==26.0.1 numpy==2.4.6 pillow==13.0.0 tqdm==4.70.1 click==8.5.1 filelock==4.2.12 scipy==1.17.1 \
	fsspec==2026.9.0 platformdirs==4.14.8 prometheus-client==0.26.0 python-json-logger==4.2.0 \
	aiohttp==3.14.5 matplotlib==3.11.2 \
	peft==0.21.2 compel==2.5.1 pyparsing==3.3.3 \
	azure-ai-contentsafety==1.0.0 azure-identity==1.27.0 tenacity==9.2.1 pyrate-limiter==4.5.1
# Azure's own packages want other versions than each other: each lot has an environment, beneath which the first lies.
SERVER_PINS := azureml-inference-server-http==1.5.1
SDK_PINS := azure-ai-ml==1.35.2 mlflow-skinny==3.17.2
TOOLS := pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.15 ruff==0.17.6 mypy==2.4.1

.PHONY: help azure demo test soak lint bench clean

help: ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned versions need Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) $(TOOLS) --editable '.[dev]'
	@touch $@

# An environment that finds in the first one whatever it has not itself.
define beneath
	$(PYTHON) -m venv $(1)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
	for pin in $(2); do $(1)/bin/python -m pip install --quiet --disable-pip-version-check $$pin || exit 1; done
	@touch $@
endef

$(VENV)/azure-server/.ready: $(READY)
	$(call beneath,$(VENV)/azure-server,$(SERVER_PINS))

$(VENV)/azure-sdk/.ready: $(READY)
	$(call beneath,$(VENV)/azure-sdk,$(SDK_PINS))

azure: $(VENV)/azure-server/.ready $(VENV)/azure-sdk/.ready ## the environments that tests of the Azure doors run in

demo: $(READY) ## render examples/prompts.csv with the built-in model and show where to look
	$(BIN)/batch-infer run examples/prompts.csv --out demo-out --steps 20 --guidance-scale 5 --results csv
	@$(BIN)/python examples/contact_sheet.py demo-out

test: $(READY) azure ## the tests, in a few minutes
	$(BIN)/python -m pytest -m "not soak" -n 2 --dist worksteal

soak: $(READY) azure ## the long versions of the tests
	$(BIN)/python -m pytest -m soak

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## batch-infer against plain diffusers on this machine
	$(BIN)/batch-infer bench --slots 32

clean: ## remove what make made
	rm -rf $(VENV) demo-out .pytest_cache .mypy_cache .ruff_cache *.egg-info
