#!/usr/bin/env bash
# Keeps a run on (spot) TPU slices going until it is done: rents them, sets them up, starts the command, and does so
# again when they are taken away. The command goes on from its newest checkpoint.
#
#   launch/babysit.sh --name=NAME --zone=ZONE --type=v5p-128 [--spot] [what else tpu_vm.sh create and run take]
#       [--max_creates=20] [--max_failures=3] [--stall=3600] [--every=60]
#       -- train --config=... --workdir=gs://BUCKET/runs/NAME
#
# Started again beside a run that is at work it joins it. Every so many seconds (--every) it asks all hosts; a question
# that fails is asked again. A command that fails is started again, unless its input is wrong (status 1 or 2), and given
# up when it failed more than max_failures times without a new step; so is one whose heartbeat (WORKDIR/heartbeats) stood
# still for --stall seconds. It also gives up after max_creates slices. When the command is done, the slices are deleted.
# --dry_run prints the commands of one round.
set -euo pipefail
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

# shellcheck disable=SC2034  # some are read by name
{
    name='' zone='' project='' type='' runtime='' num_slices='' spot=false reserved=false network='' subnetwork=''
    internal_ips=false service_account='' valid_until_duration='' internal_ip=false tunnel_through_iap=false
    env=() grace=$default_grace shared_disk='' max_creates=20 max_failures=3 stall=3600 every=60
}
if (($# == 0)); then usage; fi
read_flags "name zone project type runtime num_slices spot! reserved! network subnetwork internal_ips! service_account
    valid_until_duration internal_ip! tunnel_through_iap! env* grace shared_disk max_creates max_failures stall every" "$@"
require name zone type
require_command
for count in max_creates max_failures stall every grace; do require_count $count; done
require_assignments "${env[@]}"
require_config
require_shared_workdir

# Sets `flags` to those of the named ones that were given.
given() {
    local flag
    flags=()
    for flag in "$@"; do
        if [[ "${!flag}" == true ]]; then
            flags+=("--$flag")
        elif [[ -n "${!flag}" && "${!flag}" != false ]]; then
            flags+=("--$flag=${!flag}")
        fi
    done
}
given name zone project internal_ip tunnel_through_iap
common=("${flags[@]}")
given type runtime num_slices spot reserved network subnetwork internal_ips service_account valid_until_duration
rent=("${flags[@]}")
given grace shared_disk
start=("${flags[@]}" "${env[@]/#/--env=}")

tpu() {
    local action=$1
    shift
    "$here/tpu_vm.sh" "$action" "${common[@]}" "$@"
}

if $dry_run; then
    tpu create "${rent[@]}" --dry_run
    tpu status --dry_run
    tpu health --dry_run -- "${command[@]}"
    tpu setup --dry_run
    tpu run "${start[@]}" --dry_run -- "${command[@]}"
    tpu delete --dry_run
    exit 0
fi

say() { echo "$(date +%FT%T) $1"; }
give_up() {
    echo "babysit.sh: error: $1" >&2
    exit 1
}

workdir=$(value_of --workdir)
if [[ "$workdir" != gs://* ]]; then say "the workdir is on no bucket: whether a run hangs is not looked at"; fi

# The time of the oldest heartbeat and the lowest step of so many hosts, or nothing where there are none.
heartbeat() {
    local i urls=() beats
    if [[ "$workdir" != gs://* ]]; then return; fi
    for ((i = 0; i < $1; i++)); do urls+=("${workdir%/}/heartbeats/host-$i.json"); done
    beats=$(gcloud storage cat "${urls[@]}" 2>/dev/null) || return 0
    grep -oE '"time": *"?[^",} ]+' <<<"$beats" | sort | sed -n '1s/.*[ ":]//p'
    grep -oE '"step": *[0-9]+' <<<"$beats" | grep -oE '[0-9]+$' | sort -n | head -n 1
}

# Looks whether a run on so many hosts gets on: `quiet` counts the seconds since its heartbeat last changed. A new step
# makes failures forgotten; without a heartbeat, ten minutes of work do.
watch_heartbeat() {
    local time='' step=''
    { read -r time; read -r step; } < <(heartbeat "$1") || true
    up=$((up + every))
    if [[ -z "$time" ]]; then
        if ((up >= 600)); then failures=0; fi
        return
    fi
    if [[ "$time" != "$beat" ]]; then quiet=0; else quiet=$((quiet + every)); fi
    beat=$time
    if [[ -n "$step" ]] && ((step > furthest)); then failures=0 furthest=$step; fi
}

start_it() {
    quiet=0 up=0
    tpu run "${start[@]}" -- "${command[@]}"
}

# Starts the command again after a failure, or gives up.
try_again() {
    failures=$((failures + 1))
    if ((failures > max_failures)); then
        give_up "the command failed $failures times; see tpu_vm.sh logs. $name is kept, and costs: tpu_vm.sh delete"
    fi
    say "$1, starting it again ($failures of $max_failures)"
    start_it || true
}

# A slice may be taken away again meanwhile: the next round sees it.
set_up_and_start() {
    if tpu setup && start_it; then
        started=true setups=0
        return
    fi
    setups=$((setups + 1))
    if ((setups > max_failures)); then
        give_up "setting up failed $setups times. $name is kept, and costs: tpu_vm.sh delete"
    fi
}

look() {
    local health hosts
    health=$(tpu health -- "${command[@]}" 2>/dev/null) || health=unreachable
    case "$health" in
        done)
            say "the run is done"
            tpu delete
            exit 0 ;;
        running*)
            if ! $started; then say "it is at work already"; fi
            started=true
            hosts=${health//[^0-9]/}
            watch_heartbeat "$hosts"
            if ((quiet > stall)); then try_again "no heartbeat for $quiet s"; fi ;;
        other) give_up "another command is at work on $name" ;;
        unreachable) say "no answer from $name" ;;
        *)
            if ! $started || [[ "$health" == absent ]]; then
                set_up_and_start
                return
            fi
            case "${health##* }" in
                "$status_wrong" | "$status_usage")
                    give_up "its input is wrong; see tpu_vm.sh logs. $name is kept, and costs: tpu_vm.sh delete" ;;
                "$status_stopped")
                    say "the run was told to stop, starting it again"
                    start_it || true ;;
                "$status_stalled") try_again "the run stalled" ;;
                *) try_again "the command $health" ;;
            esac ;;
    esac
}

why=$(mktemp)
trap 'rm -f "$why"' EXIT
creates=0 failures=0 started=false last='' beat='' quiet=0 up=0 furthest=-1 setups=0
while true; do
    # Where there is no such resource the question itself fails; for other reasons, too, and then the run may be at work.
    if ! state=$(tpu status 2>"$why"); then
        state=UNKNOWN
        if grep -q NOT_FOUND "$why"; then
            state=NONE
        elif [[ -z "$last" ]]; then
            cat "$why" >&2
            exit 1
        fi
    fi
    if [[ "$state" != "$last" ]]; then say "$name is $state"; fi
    last=$state
    case "$state" in
        ACTIVE) look ;;
        NONE | SUSPENDED | SUSPENDING | FAILED | PREEMPTED | DELETING)
            started=false setups=0
            if ((creates >= max_creates)); then give_up "rented $creates slices, which is --max_creates"; fi
            if [[ "$state" != NONE ]]; then tpu delete || true; fi
            creates=$((creates + 1))
            tpu create "${rent[@]}" || say "cannot rent it now" ;;
        *) ;;  # Waiting for its turn, being made, or not to be reached now.
    esac
    sleep "$every"
done
