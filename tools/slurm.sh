#!/usr/bin/env bash
# Train on several nodes under SLURM. The job goes on by itself after pre-emption or the time limit:
#     sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 tools/slurm.sh --archive ARCHIVE \
#         --init sd-v1-5.safetensors --out runs/full --batch_size 48 --accumulate 2
#
# The #SBATCH lines below are defaults; a flag given to sbatch overrides its line.
# - 8 CPUs for each GPU: the rank, its 4 data workers (train.py --workers), and some to spare.
#   Without this line many clusters give all ranks of a node a single core. Where a node has fewer:
#   `sbatch --cpus-per-gpu 4 ...`, and --workers 2.
# - 32 GB of memory for each GPU: the rank, its data workers, and the page cache, which speeds up
#   reading the archive. `sbatch --mem-per-gpu 64G ...` asks for more.
# Where SLURM refuses both flags, delete the two lines, and ask for a node's CPUs and memory
# instead: `sbatch --cpus-per-task 64 --mem 256G ...` for 8 GPUs.
#
# How it works: one task a node, which runs torchrun. Three minutes before the end SLURM signals this
# script, which passes the signal on. torchrun signals its ranks and waits. The ranks end their step,
# save a checkpoint and leave OUT/preempted. Then this script puts the job back into the queue.
#SBATCH --job-name=efficient-3dim
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=32G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -uo pipefail

OUT=""
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
        --out) next=$((i + 1)); OUT=${!next:-} ;;
        --out=*) OUT=${!i#--out=} ;;
    esac
done
if [[ -z $OUT ]]; then
    echo "error: --out OUT is needed" >&2
    exit 1
fi
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

rm -f "$OUT/preempted"  # of the last time
# TERM means pre-emption, USR1 the time limit; to the ranks they are the same. torchrun would kill
# its ranks after 30 s, and writing a checkpoint may take longer. Older versions of torchrun (2.6,
# for one) can't be told to wait longer, and do not know USR1.
LIMIT_SIGNAL=TERM
OPTIONS=()
if torchrun --help 2>/dev/null | grep -q -e --shutdown-timeout; then
    LIMIT_SIGNAL=USR1
    OPTIONS=(--signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 150)
fi
# --cpu-bind=none: the node's one task uses all of the job's CPUs.
srun --kill-on-bad-exit=1 --cpu-bind=none torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-gpu}" \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD:29500" --rdzv_id "$SLURM_JOB_ID" --max_restarts 0 \
    "${OPTIONS[@]}" train.py "$@" &
STEP=$!
trap 'kill -$LIMIT_SIGNAL $STEP' USR1
trap 'kill -TERM $STEP' TERM
while kill -0 $STEP 2>/dev/null; do  # a trap interrupts wait
    wait $STEP
    CODE=$?
done

# torchrun turns the ranks' exit code 0 into 1, so the file tells what happened, not the code.
if [[ -e $OUT/preempted ]]; then
    echo "pre-empted: requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "error: job $SLURM_JOB_ID was not requeued; submit it again to go on" >&2
    exit 1
fi
exit "$CODE"
