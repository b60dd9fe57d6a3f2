# From a fresh clone: `make dummy` trains a small decoder, `make test` runs the tests.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Type-checked files: the public Python API and the small files it builds on.
PUBLIC := $(addprefix src/,core/geometry.py core/images.py core/weights.py core/schedules.py core/ema.py core/random_streams.py \
	models/rae.py models/encoders.py models/frozen_encoder.py models/decoder.py models/discriminator.py training/stage1_step.py \
	losses/lpips.py losses/gan.py losses/diffaug.py metrics/inception.py metrics/fid.py metrics/quality.py data/datamodule.py)

.PHONY: help setup dummy dummy2 test quick gpu lint types clean

help: ## show this list
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(STAMP) ## create .venv with the pinned requirements; again when they change

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}. Use make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

dummy: $(STAMP) ## generate data and train a small decoder, without network
	$(BIN)/python src/train.py experiment=rae_dummy

dummy2: $(STAMP) ## both stages: a tiny autoencoder, a diffusion transformer on its latents, samples by class
	$(BIN)/python scripts/dummy_stage2.py

test: $(STAMP) ## run all tests
	$(BIN)/python -m pytest -n 2

quick: $(STAMP) ## all tests except those marked slow
	$(BIN)/python -m pytest -n 2 -m "not slow"

gpu: ## measure everything on one NVIDIA GPU in ten minutes; needs PyTorch with CUDA, see scripts/gpu_report.py
	$(or $(wildcard $(BIN)/python),$(PYTHON)) scripts/gpu_report.py

lint: $(STAMP) ## check style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP) ## check types of the public API
	$(BIN)/mypy --follow-imports=silent $(PUBLIC)

clean: ## remove the environment and all caches; runs, data and weights stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
