#!/bin/bash
# box:denoise from photos: benchmarks/recipes/denoise.sh DATA RUNS
#
# DATA holds the folders photos-clean and photos-train/cid22 of clean photos, RUNS gets the run and the model. The same
# command goes on where it was interrupted; by the time of its parts, one core takes about an hour.
# The model in the tree was trained in two pieces; its card says how.
set -euo pipefail
data=$1 runs=$2 python=${PYTHON:-python}
here=$(cd "$(dirname "$0")/../.." && pwd)

"$python" "$here/training/train_autoencoder.py" denoise --output "$runs/denoise" --steps 2400 \
    --data "$data/photos-clean" --data "$data/photos-train/cid22" --val-data "$data/photos-val/cid22" --num-workers 0

"$python" - "$runs/denoise" "$runs/denoise-model" <<'PYTHON'
import sys

from ldm_vae import load_autoencoder

load_autoencoder(sys.argv[1]).half().save_pretrained(sys.argv[2])
PYTHON
# What is loaded is checked by its digest: after any change of a model's files in ldm_vae/box/NAME, run this line there.
(cd "$runs/denoise-model" && find * -name '*.json' -o -name '*.safetensors' | LC_ALL=C sort | xargs sha256sum > SHA256SUMS)
