#!/bin/bash
# box:codec from photos: benchmarks/recipes/codec.sh DATA RUNS
#
# DATA holds the folders photos-clean and photos-train/cid22 of clean photos, RUNS gets three runs and the model. The
# same command goes on where it was interrupted; on one core the trainings take about two hours and the tables eight minutes.
# The model in the tree was made in pieces, and the whole has not been run in one go; its card says what differs.
set -euo pipefail
data=$1 runs=$2 python=${PYTHON:-python}
here=$(cd "$(dirname "$0")/../.." && pwd)

train() { # NAME STEPS and further flags
    "$python" "$here/training/train_codec.py" f8c64 --output "$runs/$1" --steps "$2" "${@:3}" \
        --data "$data/photos-clean" --data "$data/photos-train/cid22" --reduction 0.5 1 \
        --val-data "$data/photos-val/cid22" --resolution 128 --batch-size 8 --learning-rate 1e-3 --rate-weight 0.012 \
        --target-bpp None --step-range 0.2 4 --num-workers 0 --log-every 100
}
train squared 11500
train visual 8000 --init "$runs/squared" --tune visual
train psnr 4000 --init "$runs/squared"

pack() { # RUN MODEL: half the bytes; the tables are fitted to the rounded weights
    "$python" - "$1" "$2/vae" <<'PYTHON'
import sys

from ldm_vae import load_autoencoder

load_autoencoder(sys.argv[1]).half().save_pretrained(sys.argv[2])
PYTHON
    "$python" -m ldm_vae.cli fit-codec --vae "$2" --overwrite --data "$data/photos-clean" --num-images 200 \
        --steps 0.2 0.3 0.43 0.62 0.9 1.3 1.9 2.8 4.2
}
pack "$runs/visual" "$runs/codec"
pack "$runs/psnr" "$runs/codec/psnr"
# What is loaded is checked by its digest: after any change of a model's files in ldm_vae/box/NAME, run this line there.
(cd "$runs/codec" && find * -name '*.json' -o -name '*.safetensors' | LC_ALL=C sort | xargs sha256sum > SHA256SUMS)
