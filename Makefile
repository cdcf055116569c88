PYTHON ?= python3
DATA ?= procedural:dead-leaves
BIN := .venv/bin

.PHONY: setup demo test check clean

setup: .venv/installed

# Made anew when what is to be installed changes; otherwise this costs nothing.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[datasets,dev]"
	touch $@

# Another DATA than last time's starts anew; the same one goes on.
demo: setup
	@grep -qsF '"data": "$(DATA)#train"' runs/demo/config.json || rm -rf runs/demo
	$(BIN)/python training/train_vae.py demo --data "$(DATA)#train" --val-data "$(DATA)#held-out" --output runs/demo
	$(BIN)/python benchmarks/reconstruction.py --vae runs/demo --data "$(DATA)#held-out" --num-images 100 --resolution 64 \
		--perceptual random --output runs/demo/reconstruction
	@echo "Look at runs/demo/samples/ and runs/demo/reconstruction/; the model is runs/demo/vae/."

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

clean:
	rm -rf .venv
