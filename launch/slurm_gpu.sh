#!/usr/bin/env bash
# Submits a command to Slurm: one process a node, which has all of its GPUs.
#
#   launch/slurm_gpu.sh --nodes=8 [--gpus=8] [--time=24:00:00] [--name=alignvlm] [--partition=P] [--account=A]
#       -- train --config=configs/stage2.py:llama31_8b --workdir=runs/stage2
#
# .venv here holds requirements.txt and requirements-gpu.txt, and this folder is one for all nodes. Two minutes before
# its time is over the run saves, and the job queues again, as it does when it is preempted. --dry_run prints the job.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

if (($# == 0)); then usage; fi
nodes='' gpus=8 time=24:00:00 name=alignvlm partition='' account=''
read_flags "nodes gpus time name partition account" "$@"
require nodes
require_count nodes
require_count gpus
require_command
for word in name partition account; do
    # They stand in the job's #SBATCH lines, which know no quotes.
    if [[ ! "${!word}" =~ ^[-A-Za-z0-9._,]*$ ]]; then wrong "--$word is '${!word}'; it takes letters, digits and . _ , -"; fi
done
if [[ ! "$time" =~ ^([0-9]+-)?[0-9]{1,3}:[0-9]{2}:[0-9]{2}$ ]]; then
    wrong "--time is '$time'; it must be HH:MM:SS or DAYS-HH:MM:SS"
fi

job() {
    local words optional=''
    printf -v words '%q ' "${command[@]}"
    if [[ -n "$partition" ]]; then optional+="#SBATCH --partition=$partition"$'\n'; fi
    if [[ -n "$account" ]]; then optional+="#SBATCH --account=$account"$'\n'; fi
    cat <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$gpus
#SBATCH --time=$time
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# To the processes, not to this script: they save.
#SBATCH --signal=TERM@120
${optional}
set -uo pipefail
export ALIGNVLM_COORDINATOR="\$(scontrol show hostnames "\$SLURM_JOB_NODELIST" | head -n 1):\$((20000 + SLURM_JOB_ID % 20000))"
export ALIGNVLM_NUM_PROCESSES="\$SLURM_NNODES"
export JAX_PLATFORMS=cuda
srun --kill-on-bad-exit=1 bash -c 'ALIGNVLM_PROCESS_ID=\$SLURM_PROCID exec "\$@"' - \\
    .venv/bin/python -m alignvlm_jax ${words% }
status=\$?
# What was told to stop has saved and says how to go on; any other failure would only fail again.
if ((status)) && tail -n 50 "slurm-\$SLURM_JOB_ID.log" | grep -q '; go on with: '; then
    scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
JOB
}

if $dry_run; then
    job
    show sbatch
else
    job | run sbatch
fi
