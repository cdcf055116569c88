#!/bin/bash
# box:f8c4 from photos: benchmarks/recipes/f8c4.sh DATA RUNS
#
# DATA holds flowers256/flowers256-train.zip and the folders photos-clean and photos-train/cid22, RUNS gets three runs
# and the model. The same command goes on where it was interrupted. By the time of its parts, one core takes two hours.
# The model in the tree was made in pieces, and the whole has not been run in one go; its card says what differs.
set -euo pipefail
data=$1 runs=$2 python=${PYTHON:-python}
here=$(cd "$(dirname "$0")/../.." && pwd)

train() { # NAME STEPS and further flags
    "$python" "$here/training/train_vae.py" f8c4 --output "$runs/$1" --steps "$2" "${@:3}" \
        --data "$data/flowers256/flowers256-train.zip" --data "$data/photos-clean:2" --data "$data/photos-train/cid22:2" \
        --val-data "$data/photos-val/cid22" --resolution 128 --batch-size 8 --num-workers 0 --log-every 50
}
train l1 2500 --perceptual none --adversarial none --learning-rate 1e-3
train features 4000 --init "$runs/l1" --perceptual features --adversarial none --learning-rate 5e-4
train adversarial 1400 --init "$runs/features" --train decoder --perceptual features --perceptual-weight 0.5 \
    --adversarial-weight 1 --disc-start 20 --learning-rate 5e-4

"$python" - "$runs/adversarial" "$runs/f8c4-model" <<'PYTHON'
import sys

from ldm_vae import load_autoencoder

load_autoencoder(sys.argv[1]).half().save_pretrained(sys.argv[2])
PYTHON
# What is loaded is checked by its digest: after any change of a model's files in ldm_vae/box/NAME, run this line there.
(cd "$runs/f8c4-model" && find * -name '*.json' -o -name '*.safetensors' | LC_ALL=C sort | xargs sha256sum > SHA256SUMS)
