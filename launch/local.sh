#!/usr/bin/env bash
# Runs one command as several processes on this machine, over loopback: what a pod does, small.
#
#   launch/local.sh [--dry_run] NUM_PROCESSES DEVICES_EACH COMMAND...
#   launch/local.sh 2 2 train --config=configs/demo.py --workdir=runs/two --config.mesh.fsdp=2
#
# COMMAND is what follows `python -m alignvlm_jax`. The output of process 0 is shown, that of all is kept in
# ${LOGS:-runs/local}/process-N.log. When one process fails the others are stopped, and its status is returned.
set -euo pipefail

dry_run=false
if [[ "${1:-}" == --dry_run ]]; then dry_run=true; shift; fi
if [[ $# -lt 3 || ! "$1" =~ ^[1-9][0-9]*$ || ! "$2" =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
count=$1 devices=$2
shift 2
python=${PYTHON:-.venv/bin/python}
logs=${LOGS:-runs/local}
port=${PORT:-$((20000 + RANDOM % 20000))}

settings=(
    "JAX_PLATFORMS=cpu"
    "XLA_FLAGS=--xla_force_host_platform_device_count=$devices"
    "ALIGNVLM_COORDINATOR=127.0.0.1:$port"
    "ALIGNVLM_NUM_PROCESSES=$count"
)

if $dry_run; then
    for ((i = 0; i < count; i++)); do
        echo env "${settings[@]}" "ALIGNVLM_PROCESS_ID=$i" "$python" -m alignvlm_jax "$@"
    done
    exit 0
fi

mkdir -p "$logs"
pids=()
# An interrupt reaches every process, so that all of them save together.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < count; i++)); do
    env "${settings[@]}" "ALIGNVLM_PROCESS_ID=$i" "$python" -m alignvlm_jax "$@" >"$logs/process-$i.log" 2>&1 &
    pids+=($!)
done
tail --pid="${pids[0]}" -n +1 -f "$logs/process-0.log" &
status=0
for ((i = 0; i < count; i++)); do
    wait -n "${pids[@]}" || { status=$?; kill -TERM "${pids[@]}" 2>/dev/null || true; break; }
done
wait || true
if [[ $status -ne 0 ]]; then
    echo "a process ended with status $status; the last lines of each:" >&2
    tail -n 3 "$logs"/process-*.log >&2
fi
exit "$status"
