PYTHON ?= python3
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

# DATA: a folder of photos. Unless given: those that scikit-image installs for the codec, and procedural shapes for the rest.
# Another DATA than last time's starts the training anew; the same one goes on.
demo: TRAINED = runs/demo/trained
demo: IMAGES = $(or $(DATA),procedural:shapes)
demo: setup
	$(BIN)/python benchmarks/equal_bytes.py --output runs/demo/codec $(if $(DATA),--data "$(DATA)")
	$(BIN)/python pipelines/generate.py --model box:flowers --output runs/demo/flowers --num-images 25 --steps 20 \
		--guidance-scale 2
	@$(BIN)/python -c 'import json, sys; sys.exit(json.load(open(sys.argv[1]))["config"]["data"] != sys.argv[2:])' \
		$(TRAINED)/vae/config.json "$(IMAGES)#train" 2> /dev/null || rm -rf $(TRAINED)
	$(BIN)/python training/train_vae.py f8c4 --init box:f8c4 --data "$(IMAGES)#train" --val-data "$(IMAGES)#held-out" \
		--output $(TRAINED)/vae --steps 200 --batch-size 16 --resolution 64 --learning-rate 1e-3 --train decoder \
		--perceptual features --adversarial-weight 0.05 --disc-start 20 --sample-every 200 --checkpoint-every 200
	$(BIN)/python benchmarks/reconstruction.py --vae box:f8c4 --vae $(TRAINED)/vae --data "$(IMAGES)#held-out" \
		--num-images 40 --resolution 64 --perceptual none --output $(TRAINED)/reconstruction
	$(BIN)/python training/cache_latents.py --vae $(TRAINED)/vae --data "$(IMAGES)" --num-images 6000 \
		--output $(TRAINED)/latents
	$(BIN)/python training/train_diffusion.py demo --latents $(TRAINED)/latents --batch-size 32 --learning-rate 1.5e-3 \
		--steps 800 --sample-every 800 --checkpoint-every 400 --output $(TRAINED)/diffusion
	$(BIN)/python pipelines/generate.py --model $(TRAINED)/diffusion --output $(TRAINED)/generated --num-images 80 \
		--guidance-scale 2 --steps 20
	@echo "runs/demo/codec/compressed.png: photos by box:codec, AVIF, WebP and JPEG, of as many bytes"
	@echo "runs/demo/flowers/contact_sheet.png: flowers by box:flowers, an early model"
	@echo "$(TRAINED)/reconstruction/gallery.png: unseen images by box:f8c4, and by it when its decoder was trained on others like them"
	@echo "$(TRAINED)/generated/contact_sheet.png: images drawn by the diffusion model"
	@echo "$$(( $$(date +%s) - $(shell date +%s) )) seconds"  # make expands the second date before the first line runs

# A process a core, each with one thread: tests that launch processes wait more than they compute.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal -m "slow or not slow"

check: setup
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

clean:
	rm -rf .venv
