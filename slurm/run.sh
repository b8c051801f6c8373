# Sourced by the job scripts beside it; "$@" are the arguments of `mlomae train`.
# shellcheck shell=bash
#
# Starts one task per GPU with srun, so that Slurm's signals reach every rank, and afterwards lets
# `mlomae.slurm.requeue` decide whether this job goes on in another attempt.

gpus=${SLURM_GPUS_PER_NODE:-0}
gpus=${gpus##*:} # "h100:8" has 8
tasks=${SLURM_NTASKS_PER_NODE:-1}
if ((gpus > 0 && gpus != tasks)); then
    echo "mlomae: error: --ntasks-per-node: found $tasks, expected $gpus, one task per GPU" >&2
    exit 2
fi

# The ranks meet at the first node, under the address by which Slurm reaches it: its name need not resolve.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol --oneliner show node "${nodes[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-${nodes[0]}}

# srun and the ranks get the signals as well; this shell stays to see how they end. Slurm sends it SIGTERM
# only when the whole job is over: cancelled, past its time limit, or requeued by Slurm itself.
ended=()
trap : USR1
trap 'ended=(--ended)' TERM

# A rank that is left behind saves and leaves by itself: Slurm must not kill it when the first one is gone.
srun --kill-on-bad-exit=0 --wait=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "$MLOMAE_PYTHON" -m mlomae train "$@" &
srun=$!
# A signal ends `wait` early, so only the last one, after the end of srun, has its exit code.
while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done
code=0
wait "$srun" || code=$?

# A signal to the whole job may come this late: it would end what decides.
trap '' USR1
code_of_job=0
"$MLOMAE_PYTHON" -m mlomae.slurm.requeue --code "$code" "${ended[@]}" -- "$@" || code_of_job=$?
exit "$code_of_job"
