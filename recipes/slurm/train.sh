# What the templates for training share. It runs on the first node of a job; "$@" is the script with its flags.
#
# SLURM starts each process of the training itself: then its signals reach the processes, and their exit status reaches
# this script. A launcher between them would keep both to itself.

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # where the processes meet
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}            # jobs on one node have one each
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
# Nodes without a network: fetch models and data on the login node, and then
# export HF_HUB_OFFLINE=1 HF_HOME=$SCRATCH/huggingface

# Until the training has begun there is nothing to save, and USR1 would end a process: it is ignored until then.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    trap "" USR1
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python "$@"' bash "$@" --resume_from_checkpoint latest &
step=$!

# srun hands signals on to all processes.
trap 'woken=1 ending=1; kill -USR1 "$step"' USR1 # the job is about to end, or to be pre-empted
trap 'woken=1; kill -TERM "$step"' TERM          # it ends now: scancel, or the grace time is over
woken=1
while ((woken)); do # a signal ends `wait` as well
    woken=0
    wait "$step"
    status=$?
done

# 75 is the exit status of a training that has saved a checkpoint because of a signal.
if ((status == 75 && ending)); then
    echo "saved a checkpoint; starting again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
