#!/usr/bin/env bash
# How the camera move should enter the model: --pose and --pose_embedding, on cars and on blocks.
#
#     studies/poses.sh                                   # a CPU, about an hour and a half on one core
#     OUT=out/poses-1200 STEPS=1200 SEEDS="0 1 2" studies/poses.sh
#     SEEDS="0 1 2" VARIANTS="no_sines no_hidden_layer two_hidden_layers linear no_token absolute" \
#         studies/poses.sh
#
# The camera move's four numbers leave out the elevation of the input view ("zero123"), or have it in
# the place of the change of distance ("elevation"). It can be seen in pictures of cars, which have an
# up and a front, and not in those of blocks. VARIANTS are those of studies/pose_mlp.py, which change
# the MLP of the row zero123-mlp. Rerun the script to go on: nothing is done twice.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
OUT=${OUT:-out/poses}
SEEDS=${SEEDS:-0 1}
KINDS=${KINDS:-cars blocks}
OBJECTS=${OBJECTS:-1024}
STEPS=${STEPS:-600}
PAIRS=${PAIRS:-128}
# Or "alex --lpips_backbone alexnet.safetensors", a file that tools.lpips_backbone makes.
LPIPS=${LPIPS:-none}
ROWS=${ROWS-zero123-token elevation-token zero123-mlp elevation-mlp}
VARIANTS=${VARIANTS:-}

# row KIND SEED POSE EMBEDDING SCORES [COMMAND]: train a model and score it, in $OUT/SCORES.jsonl.
row() {
    local run="$OUT/$5/$3-$4-$2"
    local command=${6:-}
    if [ -e "$run/scored" ]; then
        return
    fi
    $PYTHON $command train.py @presets/small.txt --archive "$OUT/$1/archive" --out "$run" --seed "$2" \
        --pose "$3" --pose_embedding "$4" --steps "$STEPS" --ema 0.99 --workers 0 --log_every 50 \
        --val_every 0 --preview_every 0 --save_every 100 --keep 1
    [ ! -e "$run/preempted" ]
    $PYTHON $command evaluate.py --ckpt "$run" --data "$OUT/$1/data" --shuffled --pairs "$PAIRS" \
        --steps 10 --scale 2 --lpips $LPIPS --workers 0 --out "$OUT/$5.jsonl"
    touch "$run/scored"
}

for kind in $KINDS; do
    if [ ! -e "$OUT/$kind/data" ]; then
        $PYTHON -m tools.shapes --out "$OUT/$kind/data" --kind "$kind" --objects "$OBJECTS"
    fi
    $PYTHON precompute_dino.py @presets/frozen-small.txt --data "$OUT/$kind/data" \
        --archive "$OUT/$kind/archive" --val_fraction 0.125 --workers 0
done
for seed in $SEEDS; do
    for name in $ROWS; do
        for kind in $KINDS; do
            row "$kind" "$seed" "${name%-*}" "${name#*-}" "$kind"
        done
    done
    for variant in $VARIANTS; do
        for kind in $KINDS; do
            row "$kind" "$seed" zero123 mlp "$kind-$variant" "-m studies.pose_mlp $variant"
        done
    done
done
for scores in "$OUT"/*.jsonl; do
    basename "$scores" .jsonl
    $PYTHON -m studies.table --eval "$scores" --by pose pose_embedding
done
