#!/usr/bin/env bash
# Train on several nodes under SLURM, and go on by itself after pre-emption or the time limit:
#     sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 tools/slurm.sh --archive ARCHIVE --init sd-v1-5.safetensors \
#         --out runs/full --batch_size 48 --accumulate 2
# One task a node, torchrun in it. Three minutes before the end SLURM signals this script, which passes it on; torchrun
# signals its ranks and waits; the ranks end their step, checkpoint, and leave OUT/preempted; then the job is requeued.
#SBATCH --job-name=efficient-3dim
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -uo pipefail

OUT=""
for ((i = 1; i <= $#; i++)); do
    case ${!i} in --out) j=$((i + 1)); OUT=${!j:-} ;; --out=*) OUT=${!i#--out=} ;; esac
done
[[ -n $OUT ]] || { echo "error: --out OUT is needed" >&2; exit 1; }
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

rm -f "$OUT/preempted"  # of the last time
# TERM: pre-emption. USR1: the time limit. torchrun would kill its ranks after 30 s; a checkpoint may take longer.
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-gpu}" \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD:29500" --rdzv_id "$SLURM_JOB_ID" --max_restarts 0 \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 150 train.py "$@" &
STEP=$!
trap 'kill -USR1 $STEP' USR1
trap 'kill -TERM $STEP' TERM
while kill -0 $STEP 2>/dev/null; do  # a trap interrupts wait
    wait $STEP
    CODE=$?
done

if [[ -e $OUT/preempted ]]; then  # torchrun turns the ranks' 0 into 1: the file tells, not the code
    echo "pre-empted: requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "error: job $SLURM_JOB_ID was not requeued; submit it again to go on" >&2
    exit 1
fi
exit "$CODE"
