PYTHON ?= python3
DATA ?= procedural:dead-leaves
BIN := .venv/bin

.PHONY: setup demo test test-all check clean

setup: .venv/installed

# Made anew when what is to be installed changes; otherwise this costs nothing.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[datasets,dev,features,onnx,page]"
	touch $@

# Another DATA than last time's starts anew; the same one goes on.
demo: setup
	@$(BIN)/python -c 'import json, sys; sys.exit(json.load(open(sys.argv[1]))["config"]["data"] != sys.argv[2:])' \
		runs/demo/config.json "$(DATA)#train" 2> /dev/null || rm -rf runs/demo
	$(BIN)/python training/train_vae.py demo --data "$(DATA)#train" --val-data "$(DATA)#held-out" --output runs/demo
	$(BIN)/python benchmarks/reconstruction.py --vae runs/demo --data "$(DATA)#held-out" --num-images 100 --resolution 64 \
		--perceptual random --output runs/demo/reconstruction
	$(BIN)/python training/cache_latents.py --vae runs/demo --data procedural:shapes --num-images 8000 --resolution 32 \
		--output runs/demo/latents
	$(BIN)/python training/train_diffusion.py demo --latents runs/demo/latents --output runs/demo/diffusion
	$(BIN)/python pipelines/generate.py --model runs/demo/diffusion --output runs/demo/generated --num-images 80 \
		--guidance-scale 2 --steps 20
	@echo "Look at runs/demo/samples/, runs/demo/reconstruction/ and runs/demo/generated/contact_sheet.png;"
	@echo "the models are runs/demo/vae/ and runs/demo/diffusion/pipeline/."

# A process a core, each with one thread: tests that launch processes wait more than they compute.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal -m "slow or not slow"

check: setup
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

clean:
	rm -rf .venv
