# Three stages: encode, train, sample. Each target first makes what it depends on, and skips what is finished.
CONFIG ?= configs/solids.yaml
NPROC  ?= $(if $(GPU),$(GPUS),1)
SET    ?=
RUN    ?=
TO     ?=
TORCH  ?=
PYTHON ?= python3

BIN    := .venv/bin
READY  := .venv/.ready
# quotes the text of a variable, dollars included, as one word for the shell
quoted  = '$(subst ','\'',$(value $(1)))'
# SET is split as a shell would do it, but nothing in it is expanded
SETS    = $(if $(strip $(value SET)),$(or $(shell $(PYTHON) -c $(SPLIT) $(call quoted,SET)),$(error SET: $(value SET): a quote is not closed)))
SPLIT   = 'import shlex, sys; print(*("--set " + shlex.quote(pair) for pair in shlex.split(sys.argv[1])))' 2>/dev/null
ARGS    = --config $(call quoted,CONFIG) $(SETS) $(if $(value RUN),--run $(call quoted,RUN))
GPU    := $(shell command -v nvidia-smi)
# counted once, at the first use, when .venv exists
GPUS    = $(eval GPUS := $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count())"))$(GPUS)
THREADS = $(shell n=$$(( $$(getconf _NPROCESSORS_ONLN) / $(NPROC) )); echo $$(( n > 0 ? n : 1 )))
TORCHRUN = $(if $(GPU),,ACCELERATE_USE_CPU=true) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(THREADS)} $(BIN)/torchrun --standalone --shutdown-timeout 600 --nproc_per_node $(NPROC) -m -- stages
# the build of torch: by default that of PyPI, for the newest CUDA on Linux; pytorch.org has cpu, cu126 and others
INDEX   = $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check
LAUNCH  = $(if $(filter-out 0 1,$(NPROC)),$(TORCHRUN),$(BIN)/latentmill)
FLAGS  ?=
# of the target that was asked for, not of those that it needs
OPTIONS = $(if $(filter $@ $(if $(filter sample,$@),all),$(MAKECMDGOALS)),$(FLAGS))

.DEFAULT_GOAL := help
.PHONY: help setup all encode verify info train sample decode eval export demo vae test lint results bench

help:  ## show this help
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo '  variables: CONFIG=configs/x.yaml  NPROC=n  SET="train.lr=1e-3 sample.steps=20"  RUN=runs/x'
	@echo "  with spaces: SET=\"data.source='my images' sample.steps=20\"  RUN='my runs/x'"
	@echo '  FLAGS="--npz" gives options to the target that is named'

setup: $(READY)  ## create .venv with pinned versions
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "latentmill needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(INSTALL) --require-hashes --no-deps --requirement constraints.txt
	$(INSTALL) $(INDEX) torch==2.13.0
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

all: sample  ## encode, train and sample: all that is needed to get samples

encode: $(READY)  ## stage one: encode images into a latent cache
	$(LAUNCH) encode $(ARGS) $(OPTIONS)

verify: $(READY)  ## check every file of the cache against its SHA-256
	$(BIN)/latentmill verify $(ARGS) $(OPTIONS)

info: encode  ## describe the cache, with pictures
	$(BIN)/latentmill info $(ARGS) $(OPTIONS)

train: encode  ## stage two: train a model on the latent cache
	$(LAUNCH) train $(ARGS) $(OPTIONS)

sample: train  ## draw samples from the model: PNG files, a contact sheet and a page
	$(LAUNCH) sample $(ARGS) $(if $(filter decode,$(MAKECMDGOALS)),--latents) $(OPTIONS)

decode: sample  ## draw latents first, and then decode them; sample does both at once
	$(LAUNCH) decode $(ARGS) $(OPTIONS)

# with these options, nothing needs to be trained first
eval: $(if $(filter --images% --repeat%,$(FLAGS)),$(READY),train)  ## measure samples against real images, and write a receipt
	$(BIN)/latentmill evaluate $(ARGS) $(OPTIONS)

export: train  ## write the model as a folder that diffusers loads: make export TO=exports/solids
	$(BIN)/latentmill export $(ARGS) $(if $(value TO),--to $(call quoted,TO)) $(OPTIONS)

demo: $(READY)  ## serve a page on this machine that draws images from trained models
	$(BIN)/latentmill demo $(if $(value RUN),--run $(call quoted,RUN)) $(OPTIONS)

vae: $(READY)  ## train the bundled VAE again: make vae PHOTOS=folder-of-class-folders
	$(BIN)/latentmill train-vae $(call quoted,PHOTOS)

test: $(READY)  ## run the tests
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

results: encode  ## measure the effect of each design choice and write docs/results.md, in one night
	$(BIN)/python -m benchmarks.results --config $(call quoted,CONFIG) $(SETS)

bench: train  ## check whether samples of the default run show the requested class
	$(BIN)/python -m benchmarks.solids_accuracy $(ARGS)
