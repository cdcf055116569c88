#!/bin/bash
# box:flowers from photos: benchmarks/recipes/flowers.sh DATA RUNS [--gpu]
#
# DATA holds flowers256/flowers256-train.zip and flowers256-val.zip, RUNS gets two caches of latents, a run and the model.
# The same command goes on where it was interrupted. One core takes about two hours. With --gpu a larger denoiser is
# trained with settings for ten minutes of a card like the H200, by its operations; that has not been run on one.
set -euo pipefail
data=$1 runs=$2 python=${PYTHON:-python}
here=$(cd "$(dirname "$0")/../.." && pwd)

if [ "${3:-}" = --gpu ]; then
    settings=(small --optimizer muon --learning-rate 4e-3 --batch-size 256 --steps 4000 --mixed-precision bf16 --compile)
else
    settings=(tiny-256 --steps 5000 --num-workers 0)
fi
for part in train val; do
    "$python" "$here/training/cache_latents.py" --vae box:f8c4 --data "$data/flowers256/flowers256-$part.zip" \
        --resolution 256 --flip --output "$runs/flowers-latents-$part"
done
"$python" "$here/training/train_diffusion.py" "${settings[@]}" --output "$runs/flowers" --flip \
    --latents "$runs/flowers-latents-train" --val-latents "$runs/flowers-latents-val"

"$python" - "$runs/flowers" "$runs/flowers-model" <<'PYTHON'
import sys

import torch

from ldm_vae.pipeline import load_pipeline

load_pipeline(sys.argv[1]).to(torch.float16).save_pretrained(sys.argv[2])
PYTHON
# What is loaded is checked by its digest: after any change of a model's files in ldm_vae/box/NAME, run this line there.
(cd "$runs/flowers-model" && find * -name '*.json' -o -name '*.safetensors' | LC_ALL=C sort | xargs sha256sum > SHA256SUMS)
