#!/usr/bin/env bash
# Submits a command to Slurm: one process a node, which has all of its GPUs.
#
#   launch/slurm_gpu.sh --nodes=8 [--gpus=8] [--time=24:00:00] [--name=alignvlm] [--partition=P] [--account=A]
#       [--qos=Q] [--reservation=R] [--constraint=C] [--env=NAME=VALUE ...] [--grace=600] [--restarts=10]
#       -- train --config=configs/stage2.py:llama31_8b --workdir=runs/stage2
#
# .venv here holds requirements.txt and requirements-gpu.txt, and this folder is one for all nodes. So many seconds
# before its time is over (--grace) the run saves, and the job queues again, as it does when it is preempted; after a
# stall or a lost node, too, as often as --restarts says. Wrong input ends it. --dry_run prints the job.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

if (($# == 0)); then usage; fi
# shellcheck disable=SC2034  # some are read by name
nodes='' gpus=8 time=24:00:00 name=alignvlm partition='' account='' qos='' reservation='' constraint=''
env=() grace=$default_grace restarts=10
read_flags "nodes gpus time name partition account qos reservation constraint env* grace restarts" "$@"
require nodes
for count in nodes gpus grace restarts; do require_count $count; done
require_assignments "${env[@]}"
require_command
require_config
for word in name partition account qos reservation constraint; do
    # They stand in the job's #SBATCH lines, which know no quotes.
    if [[ ! "${!word}" =~ ^[-A-Za-z0-9._,]*$ ]]; then wrong "--$word is '${!word}'; it takes letters, digits and . _ , -"; fi
done
if [[ ! "$time" =~ ^([0-9]+-)?[0-9]{1,3}:[0-9]{2}:[0-9]{2}$ ]]; then
    wrong "--time is '$time'; it must be HH:MM:SS or DAYS-HH:MM:SS"
fi

job() {
    local words optional='' exports='' one
    printf -v words '%q ' "${command[@]}"
    for one in partition account qos reservation constraint; do
        if [[ -n "${!one}" ]]; then optional+="#SBATCH --$one=${!one}"$'\n'; fi
    done
    for one in "${env[@]}"; do exports+="export ${one%%=*}=$(printf %q "${one#*=}")"$'\n'; done
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
#SBATCH --signal=TERM@$grace
${optional}
set -uo pipefail
export ALIGNVLM_COORDINATOR="\$(scontrol show hostnames "\$SLURM_JOB_NODELIST" | head -n 1):\$((20000 + SLURM_JOB_ID % 20000))"
export ALIGNVLM_NUM_PROCESSES="\$SLURM_NNODES"
export JAX_PLATFORMS=cuda
${exports}srun --kill-on-bad-exit=1 bash -c 'ALIGNVLM_PROCESS_ID=\$SLURM_PROCID exec "\$@"' - \\
    .venv/bin/python -m alignvlm_jax ${words% }
status=\$?
case \$status in
    0 | $status_wrong | $status_usage) again=false ;;
    # Was told to stop and has saved: not counted.
    $status_stopped) again=true ;;
    *) if ((\${SLURM_RESTART_COUNT:-0} < $restarts)); then again=true; else again=false; fi ;;
esac
if \$again; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\$status"
JOB
}

if $dry_run; then
    job
    show sbatch
else
    job | run sbatch
fi
