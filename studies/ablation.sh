#!/usr/bin/env bash
# The ablations of Table 1 and figure 6 at a size that a CPU can take, on procedural objects (section 4.2):
#
#     make ablation                       # the same as: OUT=out/ablation STEPS=200 SEEDS="0 1" studies/ablation.sh
#     DEVICE=cuda PX=64 FACTOR=4 PREDICTION=x0 OBJECTS=8192 PRETRAIN=20000 STEPS=5000 BATCH=256 SEEDS="0 1 2" studies/ablation.sh
#
# One model is pretrained with uniform timesteps and every condition nulled, in Stable Diffusion's stead; each row is
# finetuned from it, with the seeds in the outer loop, so that what is there at any time is whole rounds. What was done
# is not done again. Rows that need pretrained CLIP or DINOv2 are left out: random encoders prove nothing about them.
# Deviation: v prediction, as a stand-in this small never learns eps; the paper finetunes Stable Diffusion on eps. With
# squares of 4 pixels it takes x0, as docs/results.md has it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} OUT=${OUT:-out/ablation} DEVICE=${DEVICE:-auto} SEEDS=${SEEDS:-0 1} WORKERS=${WORKERS:-1}
OBJECTS=${OBJECTS:-512} BATCH=${BATCH:-32} PRETRAIN=${PRETRAIN:-4000} STEPS=${STEPS:-200} PAIRS=${PAIRS:-128}
PX=${PX:-24} FACTOR=${FACTOR:-2}  # side of the images, and of the squares of pixels that are a latent's channels
PREDICTION=${PREDICTION:-v}
MEANS=${MEANS-1000 700 500 300 0} STDS=${STDS-100 300 400 500}
SIZE=${SIZE:---width 64 --channel_mult 1 2 --res_blocks 1 --attention 1 2 --heads 4 --context_dim 128}
COMMON="--archive $OUT/archive $SIZE --prediction $PREDICTION --batch_size $BATCH --accumulate 1 --precision fp32 --log_every 25
    --val_every 100 --val_pairs 64 --preview_every 0 --save_every 100 --keep 1 --device $DEVICE --workers $WORKERS"

test -e "$OUT/data" || { rm -rf "$OUT/data.part" && mkdir -p "$OUT" &&
    $PYTHON -m tools.shapes --out "$OUT/data.part" --objects "$OBJECTS" --views 12 --size "$PX" --plain &&
    mv "$OUT/data.part" "$OUT/data"; }
$PYTHON precompute_dino.py --data "$OUT/data" --archive "$OUT/archive" --codec pixels --pixels_factor "$FACTOR" \
    --image_size "$PX" --val_fraction 0.0625 --encoder vit_tiny_patch16_224 --weights random --layers 3 7 11 \
    --encoder_size 64 --precision fp32 --workers "$WORKERS"

training() {  # RUN FLAGS...; stops the study where a signal, Ctrl-C say, stopped it
    local run=$1
    shift
    $PYTHON train.py $COMMON --out "$run" "$@"
    test ! -e "$run/preempted"
}

training "$OUT/pretrained" --unconditional --no-amalgamate --t_sampling uniform --steps "$PRETRAIN" \
    --lr 1e-3 --warmup 100 --ema 0.999

row() {  # NAME SEED FLAGS...: finetune, then score
    local run="$OUT/runs/$1-$2" seed=$2
    shift 2
    test -e "$run/scored" && return
    training "$run" --init "$OUT/pretrained" --seed "$seed" --steps "$STEPS" --lr 5e-4 --cc_lr 3 \
        --warmup 20 --ema 0.99 "$@"
    $PYTHON evaluate.py --ckpt "$run" --data "$OUT/data" --pairs "$PAIRS" --steps 20 --scale 1 --lpips none \
        --device "$DEVICE" --workers "$WORKERS" --out "$OUT/eval.jsonl"
    touch "$run/scored"
}

for seed in $SEEDS; do
    row uniform "$seed" --no-amalgamate --t_sampling uniform
    for mean in $MEANS; do
        row "mean$mean" "$seed" --no-amalgamate --t_mean "$mean"
    done
    for std in $STDS; do
        row "std$std" "$seed" --no-amalgamate --t_std "$std"
    done
    row amalgamate "$seed" --amalgamate
done

runs() { local list=""; for seed in $SEEDS; do list+=",$OUT/runs/$1-$seed"; done; echo "${list#,}"; }
$PYTHON visualize.py sweep --eval "$OUT/eval.jsonl" --metric psnr --where amalgamate=False --out "$OUT/sweep"
$PYTHON visualize.py curves "uniform=$(runs uniform)" "Gaussian=$(runs mean1000)" "Gaussian, amalgamation=$(runs amalgamate)" \
    --metric val_loss_ema --x samples --out "$OUT/curves"
$PYTHON -m studies.table --eval "$OUT/eval.jsonl"
