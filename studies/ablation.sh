#!/usr/bin/env bash
# Table 1 and figures 6 and 7 (section 4.2) on procedural cars, small enough for a CPU.
#
#     make ablation    # runs studies/ablation.sh with the defaults below: 90 minutes on one core
#     OUT=out/ablation-large DEVICE=cuda OBJECTS=8192 PRETRAIN=20000 STEPS=5000 SCORE_EVERY=500 \
#         studies/ablation.sh
#
# First one model is pretrained with uniform timesteps and without conditions. It stands in for
# Stable Diffusion. Then each row is finetuned from it and scored. The seeds are the outer loop, so
# the table can be read after each of them. Rerun it to go on: nothing is done twice.
# Rows that need pretrained CLIP or DINOv2 are left out: random encoders prove nothing about them.
#
# Deviation: x0 prediction, because a model this small does not learn to predict eps
# (docs/results.md). The paper finetunes Stable Diffusion, which predicts eps.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
OUT=${OUT:-out/ablation}
DEVICE=${DEVICE:-auto}
WORKERS=${WORKERS:-0}
SEEDS=${SEEDS:-0 1 2}
OBJECTS=${OBJECTS:-1024}
PRETRAIN=${PRETRAIN:-4000}
STEPS=${STEPS:-200}
SCORE_EVERY=${SCORE_EVERY:-40}    # steps between the scores of the two runs that figure 7 compares
PAIRS=${PAIRS:-128}
MEANS=${MEANS-700 500 300 0}
STDS=${STDS-100 400}
# Or "alex --lpips_backbone alexnet.safetensors", a file that tools.lpips_backbone makes.
LPIPS=${LPIPS:-none}
SPLIT="--val_fraction 0.125"

if [ ! -e "$OUT/data" ]; then
    $PYTHON -m tools.shapes --out "$OUT/data" --objects "$OBJECTS"
fi
$PYTHON precompute_dino.py @presets/frozen-small.txt $SPLIT --data "$OUT/data" \
    --archive "$OUT/archive" --workers "$WORKERS"

ARCHIVED="--archive $OUT/archive"
ONLINE="@presets/frozen-small.txt $SPLIT --online --data $OUT/data"
UNIFORM="--no-amalgamate --t_sampling uniform"
GAUSSIAN="--no-amalgamate --t_mean 1000 --t_std 200"
OURS="--amalgamate --t_mean 1000 --t_std 200"

# train RUN FLAGS...: train, and stop the study if a signal (such as Ctrl-C) stopped the training.
train() {
    local run=$1
    shift
    $PYTHON train.py @presets/small.txt --pose_embedding token --out "$run" --device "$DEVICE" \
        --workers "$WORKERS" --log_every 25 --val_every 0 --preview_every 0 "$@"
    [ ! -e "$run/preempted" ]
}

# row NAME SEED FLAGS...: finetune the pretrained model and score its checkpoints.
row() {
    local run="$OUT/runs/$1-$2"
    local seed=$2
    shift 2
    if [ -e "$run/scored" ]; then
        return
    fi
    train "$run" --init "$OUT/pretrained" --seed "$seed" --steps "$STEPS" --lr 5e-4 --warmup 20 \
        --ema 0.99 --save_every "$STEPS" --keep 99 "$@"
    $PYTHON evaluate.py --ckpt "$run"/step_* --data "$OUT/data" --pairs "$PAIRS" --steps 20 \
        --scale 1 --lpips $LPIPS --device "$DEVICE" --workers "$WORKERS" --out "$OUT/eval.jsonl"
    touch "$run/scored"
}

# runs NAME: the row's runs, with commas between them.
runs() {
    local list=""
    local seed
    for seed in $SEEDS; do
        list+=",$OUT/runs/$1-$seed"
    done
    echo "${list#,}"
}

train "$OUT/pretrained" $ARCHIVED --unconditional --no-amalgamate --t_sampling uniform \
    --steps "$PRETRAIN" --save_every 500 --keep 1

for seed in $SEEDS; do
    row zero123 "$seed" $ONLINE $UNIFORM --save_every "$SCORE_EVERY"
    row gaussian "$seed" $ARCHIVED $GAUSSIAN
    row ours "$seed" $ARCHIVED $OURS --save_every "$SCORE_EVERY"
    row mlp "$seed" $ARCHIVED $OURS --pose_embedding mlp
    for mean in $MEANS; do
        row "mean$mean" "$seed" $ARCHIVED $GAUSSIAN --t_mean "$mean"
    done
    for std in $STDS; do
        row "std$std" "$seed" $ARCHIVED $GAUSSIAN --t_std "$std"
    done
done

METRIC=psnr
if [ "$LPIPS" != none ]; then
    METRIC=lpips
fi
$PYTHON visualize.py sweep --eval "$OUT/eval.jsonl" --metric $METRIC --out "$OUT/sweep" \
    --where amalgamate=False
$PYTHON visualize.py curves "Zero-1-to-3's recipe=$(runs zero123)" "ours=$(runs ours)" \
    --eval "$OUT/eval.jsonl" --metric $METRIC --out "$OUT/curves"
$PYTHON -m studies.time_to_score --eval "$OUT/eval.jsonl" --metric $METRIC \
    --base "$(runs zero123)" --ours "$(runs ours)"
$PYTHON -m studies.table --eval "$OUT/eval.jsonl" --by t_sampling t_mean t_std amalgamate \
    pose_embedding online
