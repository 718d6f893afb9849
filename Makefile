# `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# requirements.lock has the tested versions, pyproject.toml the supported ranges. pip installs torch first, so that it takes
# the build that this machine has. `make TORCH=torch==VERSION` takes another version than that of the lock.
locked = $(shell sed -n 's/^\($(1)==[^ ;]*\).*/\1/p' requirements.lock)
TORCH ?= $(call locked,torch)
UV := $(call locked,uv)
DEVICE ?= cuda

.PHONY: help azure azurite demo test promises soak lint docs wheel lowest newest lock bench gpu-check clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 16

# install ENVIRONMENT,ARGUMENTS: uv takes half of the time of pip, but does not read its configuration. pip is the fallback.
install = $(1)/bin/uv pip install --quiet --compile-bytecode --python $(1)/bin/python $(2) || $(1)/bin/python $(PIP_INSTALL) $(2)

$(READY): pyproject.toml requirements.lock Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) $(TORCH) $(UV)
	@grep -v ^torch== requirements.lock > $(VENV)/requirements.lock
	$(call install,$(VENV),--requirement $(VENV)/requirements.lock)
	$(BIN)/python $(PIP_INSTALL) --no-deps --editable .
	@touch $@

# Azure's packages need other versions than the rest. Each set has an environment that falls back to the main one.
define fallback_environment
	$(PYTHON) -m venv $(1)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
	$(1)/bin/python $(PIP_INSTALL) --no-deps --requirement $(2)
	@touch $@
endef

$(VENV)/azure-server/.ready: $(READY) tools/azure-server.lock
	$(call fallback_environment,$(VENV)/azure-server,tools/azure-server.lock)

$(VENV)/azure-sdk/.ready: $(READY) tools/azure-sdk.lock
	$(call fallback_environment,$(VENV)/azure-sdk,tools/azure-sdk.lock)

azure: $(VENV)/azure-server/.ready $(VENV)/azure-sdk/.ready ## set up the environments for the tests of the Azure endpoints

# Azure's storage emulator, for the tests of OUT in an object store, which are skipped without it.
$(VENV)/azurite/.ready: $(READY) tools/azurite/package.json tools/azurite/package-lock.json
	@mkdir -p $(@D)
	cp tools/azurite/package.json tools/azurite/package-lock.json $(@D)
	@cd $(@D) && npm ci --no-audit --no-fund --loglevel=error && touch .ready || \
	echo "npm is missing or failed: the tests with Azure's storage emulator will be skipped"

azurite: $(VENV)/azurite/.ready ## install Azure's storage emulator for the tests, if npm is installed

demo: $(READY) ## render examples/prompts.csv with the built-in model and say where the images are
	$(BIN)/batch-infer run examples/prompts.csv --out demo-out --steps 20 --guidance-scale 5 --results csv
	@$(BIN)/python examples/contact_sheet.py demo-out

test: $(READY) azure azurite ## run the tests, in a few minutes
	$(BIN)/python -m pytest -m "not soak and not promises" -n 2 --dist worksteal

promises: $(READY) azure azurite ## run the longer tests of what the documentation promises: kills, launchers, hung workers, equal bytes
	$(BIN)/python -m pytest -m promises -n 3 --dist worksteal

soak: $(READY) azure azurite ## run the longest tests
	$(BIN)/python -m pytest -m soak

lint: $(READY) ## check style and types: ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=examples/demo_model $(BIN)/mypy examples/*.py examples/nightly/*.py examples/ray/*.py examples/demo_model/*.py examples/azureml/*.py

# LOWEST_TORCH, NEWEST_TORCH: the oldest and the newest torch that this machine can install.
LOWEST := .venv-lowest
NEWEST := .venv-newest
LOWEST_TORCH ?= $(TORCH)
NEWEST_TORCH ?= $(TORCH)
lowest: pyproject.toml ## run the tests with the lowest supported version of their dependencies, except torch
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python $(PIP_INSTALL) $(LOWEST_TORCH) $(UV) packaging
	$(LOWEST)/bin/python tools/lowest_versions.py > $(LOWEST)/constraints.txt
	$(call install,$(LOWEST),--constraint $(LOWEST)/constraints.txt --editable '.[dev]')
	$(LOWEST)/bin/python -m pytest -m "not soak and not promises" -n 2 --dist worksteal

newest: pyproject.toml ## run the tests with the newest version of their dependencies, except torch
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP_INSTALL) $(NEWEST_TORCH) uv
	$(call install,$(NEWEST),--editable '.[dev]')
	$(NEWEST)/bin/python -m pytest -m "not soak and not promises" -n 2 --dist worksteal

docs: $(READY) ## build the documentation site in site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

WHEEL := build/wheel-environment
wheel: $(READY) ## build the package in dist/, and try it in an environment without extras and without this checkout
	@mkdir -p build && rm -rf dist $(WHEEL)
	$(BIN)/python -m build --outdir dist . > build/build.log || { cat build/build.log; exit 1; }
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python $(PIP_INSTALL) $(TORCH) $(UV)
	$(call install,$(WHEEL),--constraint requirements.lock dist/*.whl)
	$(BIN)/python -m tools.try_wheel dist $(WHEEL)

lock: $(READY) ## write the lock files (LOCK=--upgrade: with the newest versions)
	$(BIN)/python tools/write_locks.py $(LOCK)

bench: $(READY) ## compare batch-infer with plain diffusers on this machine
	$(BIN)/batch-infer bench --slots 32

gpu-check: $(READY) ## prove and measure the GPU path in about nine minutes (DEVICE=cpu: what a CPU can)
	$(BIN)/python -m tools.gpu_check --device $(DEVICE) --out gpu-check-out

clean: ## remove what make made
	rm -rf $(VENV) $(LOWEST) $(NEWEST) build dist site demo-out gpu-check-out .pytest_cache .mypy_cache .ruff_cache *.egg-info
