#!/bin/bash
# box:codec from photos: benchmarks/recipes/codec.sh DATA RUNS
#
# DATA holds the folders photos-clean and photos-train/cid22 of clean photos, RUNS gets two runs and the model. The same
# command goes on where it was interrupted. The model in the tree was trained by an earlier form of these commands, for
# 66 minutes of one core; its card says what differs. This form has not been run to its end.
set -euo pipefail
data=$1 runs=$2 python=${PYTHON:-python}
here=$(cd "$(dirname "$0")/../.." && pwd)
common=(--data "$data/photos-clean" --data "$data/photos-train/cid22" --reduction 0.5 1 --val-data "$data/photos-val/cid22"
    --resolution 128 --batch-size 8 --learning-rate 1e-3 --rate-weight 0.012 --target-bpp None --step-range 0.4 4
    --num-workers 0 --log-every 100)

"$python" "$here/training/train_codec.py" f8c64 --output "$runs/squared" --steps 9000 "${common[@]}"
"$python" "$here/training/train_codec.py" f8c64 --output "$runs/visual" --steps 7000 --init "$runs/squared" \
    --coarse-weight 2 "${common[@]}"

# Half the bytes: the tables are fitted to the rounded weights.
"$python" - "$runs/visual" "$runs/codec/vae" <<'PYTHON'
import sys

from ldm_vae import load_autoencoder

load_autoencoder(sys.argv[1]).half().save_pretrained(sys.argv[2])
PYTHON
"$python" -m ldm_vae.cli fit-codec --vae "$runs/codec" --overwrite --data "$data/photos-clean" --num-images 200 \
    --steps 0.4 0.56 0.8 1.1 1.6 2.2 3.2 4.5
