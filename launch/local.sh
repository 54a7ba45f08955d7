#!/usr/bin/env bash
# Runs one command as several processes on this machine, over loopback: what a pod does, small.
#
#   launch/local.sh [--dry_run] [--env=NAME=VALUE ...] NUM_PROCESSES DEVICES_EACH COMMAND...
#   launch/local.sh 2 2 train --config=configs/demo.py --workdir=runs/two --config.mesh.fsdp=2
#
# COMMAND is what follows `python -m alignvlm_jax`. The output of process 0 is shown, that of all is kept in
# ${LOGS:-runs/local}/process-N.log. Ctrl-C and SIGTERM are handed on once, and all processes save together. When one
# fails the others are stopped, after ${GRACE:-30} seconds for good. Returned is the first status that is not 0; after
# Ctrl-C 130.
set -euo pipefail

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit "$1"
}

dry_run=false env=() flags=() xla_flags=''
while [[ "${1:-}" == --* ]]; do
    case "$1" in
        --help) usage 0 ;;
        --dry_run) dry_run=true; shift; continue ;;
        --env=XLA_FLAGS=*) xla_flags+=" ${1#--env=XLA_FLAGS=}" ;;  # beside the one below
        --env=[A-Za-z_]*=*) env+=("${1#--env=}") ;;
        *)
            echo "local.sh: error: unknown flag $1; flags: --env=NAME=VALUE --dry_run" >&2
            exit 2 ;;
    esac
    flags+=("$1")
    shift
done
if [[ $# -lt 3 || ! "$1" =~ ^[1-9][0-9]*$ || ! "$2" =~ ^[1-9][0-9]*$ ]]; then
    usage 2
fi
count=$1 devices=$2
shift 2
python=${PYTHON:-.venv/bin/python}
logs=${LOGS:-runs/local}
port=${PORT:-$((20000 + RANDOM % 20000))}

settings=(
    "JAX_PLATFORMS=cpu"
    "XLA_FLAGS=--xla_force_host_platform_device_count=$devices$xla_flags"
    "ALIGNVLM_COORDINATOR=127.0.0.1:$port"
    "ALIGNVLM_NUM_PROCESSES=$count"
    "ALIGNVLM_LAUNCHER=$0${flags[0]+$(printf ' %q' "${flags[@]}")} $count $devices"
    "${env[@]}"
)

if $dry_run; then
    # shellcheck source=launch/common.sh
    source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
    for ((i = 0; i < count; i++)); do
        show env "${settings[@]}" "ALIGNVLM_PROCESS_ID=$i" "$python" -m alignvlm_jax "$@"
    done
    exit 0
fi

mkdir -p "$logs"
running=()  # By process id.
stopping=false interrupted=false
# shellcheck disable=SC2329  # called by the trap
stop() {
    stopping=true
    if [[ "$1" == INT ]]; then interrupted=true; fi
    kill -TERM "${!running[@]}" 2>/dev/null || true
}
for name in HUP INT TERM; do
    # shellcheck disable=SC2064  # the name of this round
    trap "stop $name" "$name"
done
# With job control each process has a group of its own: Ctrl-C of a terminal would reach it beside the signal that we
# hand on, and the second one kills without saving.
set -m
for ((i = 0; i < count; i++)); do
    : >"$logs/process-$i.log"  # Here: `tail` may come before the process has made it.
    env "${settings[@]}" "ALIGNVLM_PROCESS_ID=$i" "$python" -m alignvlm_jax "$@" >>"$logs/process-$i.log" 2>&1 &
    running[$!]=$i
    if ((i == 0)); then first=$!; fi
done
tail --pid="$first" -n +1 -f "$logs/process-0.log" &
shown=$!
set +m

status=0 deadline=
while ((${#running[@]})); do
    sleep 0.2 || true  # Not `wait -n`: it may miss a process that ended before, and then complains.
    for pid in "${!running[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then continue; fi
        code=0
        wait "$pid" 2>/dev/null || code=$?
        unset "running[$pid]"
        if ((status == 0)); then status=$code; fi
    done
    if ((status == 0)); then continue; fi
    if [[ -z "$deadline" ]]; then
        if ! $stopping; then kill -TERM "${!running[@]}" 2>/dev/null || true; fi
        deadline=$((SECONDS + ${GRACE:-30}))
    elif ((SECONDS >= deadline)); then
        # What waits in the midst of a step for a process that is gone never comes to look at a signal.
        kill -KILL "${!running[@]}" 2>/dev/null || true
    fi
done
wait "$shown" || true
if ((status)); then
    echo "a process ended with status $status; the last lines of each:" >&2
    tail -n 3 "$logs"/process-*.log >&2
fi
# The processes save at a SIGTERM; whoever typed Ctrl-C, or a script around it, expects the status of SIGINT.
if $interrupted && ((status == 143)); then status=130; fi
exit "$status"
