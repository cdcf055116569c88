#!/bin/bash
# What training gains by a start from the box: benchmarks/recipes/warm_start.sh DATA RUNS [PART [PIPELINE]]
#
# PART is autoencoders or diffusion; both unless given. PIPELINE is what the diffusion models start from, box:flowers.
# DATA holds photos-train/caltech101, photos-val/caltech101, magnetic-tile and photos-train/clothing, none of which the
# box was trained on. RUNS gets the runs, and in RUNS/result the table and the plots. The steps are those of about 1, 5
# and 20 minutes of one core with OMP_NUM_THREADS=1, so that the autoencoders take two hours and the diffusion models a
# quarter of an hour. The same command goes on where it was interrupted.
set -euo pipefail
data=$1 runs=$2 part=${3:-all} pipeline=${4:-box:flowers} python=${PYTHON:-python}
here=$(cd "$(dirname "$0")/../.." && pwd)

figures() { # MODEL HELD_OUT OUTPUT
    [ -e "$3/results.json" ] || "$python" "$here/benchmarks/reconstruction.py" --vae "$1" --data "$2" --output "$3" \
        --num-images 30 --resolution 192 --perceptual none --gallery 0
}
autoencoder() { # STEPS FOLDER TRAINING_IMAGES HELD_OUT START and further flags
    local run="$runs/$2/$5-$1"
    "$python" "$here/training/train_vae.py" f8c4 --output "$run" --data "$3" --val-data "$4" --steps "$1" "${@:6}" \
        --resolution 128 --batch-size 8 --perceptual features --adversarial none --mixed-precision no --num-workers 0 \
        --tracker none
    figures "$run" "$4" "$run/reconstruction"
}
both() { # STEPS FOLDER TRAINING_IMAGES HELD_OUT
    autoencoder "$@" nothing --learning-rate 1e-3
    autoencoder "$@" box --learning-rate 3e-4 --init box:f8c4
}
denoiser() { # START and further flags
    "$python" "$here/training/train_diffusion.py" tiny-256 --output "$runs/clothing/$1" "${@:2}" --steps 300 \
        --latents "$runs/clothing/latents-train" --val-latents "$runs/clothing/latents-held-out" --flip \
        --mixed-precision no --num-workers 0 --tracker none --sample-every 300 --log-every 10
}

if [ "$part" != diffusion ]; then
    photos=(caltech101 "$data/photos-train/caltech101" "$data/photos-val/caltech101")
    tiles=(magnetic-tile "$data/magnetic-tile/train/good" "$data/magnetic-tile/test/good")
    figures box:f8c4 "${photos[2]}" "$runs/caltech101/box-0/reconstruction"
    figures box:f8c4 "${tiles[2]}" "$runs/magnetic-tile/box-0/reconstruction"
    for steps in 100 500 2000; do
        both $steps "${photos[@]}"
        both $steps "${tiles[@]}"
    done
fi
if [ "$part" != autoencoders ]; then
    for split in train held-out; do
        "$python" "$here/training/cache_latents.py" --vae "$pipeline" --data "$data/photos-train/clothing#$split" \
            --resolution 256 --flip --num-workers 0 --output "$runs/clothing/latents-$split"
    done
    denoiser nothing
    denoiser box --init "$pipeline" --learning-rate 1e-3
fi
"$python" "$here/benchmarks/studies/warm_start.py" --runs "$runs" --output "$runs/result"
