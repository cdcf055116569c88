#!/bin/bash
# box:flowers from photos: benchmarks/recipes/flowers.sh DATA RUNS [--gpu]
#
# DATA holds flowers256/flowers256-train.zip and flowers256-val.zip, photos-clean and photos-train/cid22, RUNS gets two
# caches of latents, two runs and the model. The same command goes on where it was interrupted; one core takes more
# than two hours. The model in the tree was made in pieces; its card says how. With --gpu a larger denoiser is trained with settings for ten minutes of a card like the H200, by its
# operations; that has not been run on one. The decoder learns to bear the errors of sampled latents.
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
"$python" "$here/training/train_vae.py" f8c4 --init "$runs/flowers-latents-train/vae" --output "$runs/flowers-decoder" \
    --train robust-decoder --perceptual features --perceptual-weight 0.3 --adversarial-weight 1 \
    --disc-start 20 --learning-rate 5e-4 --steps 1100 --resolution 128 --batch-size 8 --num-workers 0 \
    --data "$data/flowers256/flowers256-train.zip" --data "$data/photos-clean:2" --data "$data/photos-train/cid22:2" \
    --val-data "$data/photos-val/cid22"
"$python" "$here/training/train_diffusion.py" "${settings[@]}" --output "$runs/flowers" --flip \
    --latents "$runs/flowers-latents-train" --val-latents "$runs/flowers-latents-val"

"$python" - "$runs/flowers" "$runs/flowers-decoder" "$runs/flowers-model" <<'PYTHON'
import sys

import torch

from ldm_vae import LatentDiffusionPipeline, load_autoencoder
from ldm_vae.pipeline import load_pipeline

trained = load_pipeline(sys.argv[1])
vae, names = load_autoencoder(sys.argv[2]), trained.config.class_names
pipeline = LatentDiffusionPipeline(vae, trained.unet, trained.scheduler, class_names=names)
pipeline.to(torch.float16).save_pretrained(sys.argv[3])
PYTHON
# What is loaded is checked by its digest: after any change of a model's files in ldm_vae/box/NAME, run this line there.
(cd "$runs/flowers-model" && find * -name '*.json' -o -name '*.safetensors' | LC_ALL=C sort | xargs sha256sum > SHA256SUMS)
