#!/usr/bin/env bash
# Rents a Cloud TPU slice through a queued resource and runs a command on all of its hosts.
#
#   launch/tpu_vm.sh create --name=NAME --zone=ZONE --type=v5p-128 [--spot] [--project=P] [--runtime=R]
#   launch/tpu_vm.sh setup  --name=NAME --zone=ZONE [--bucket=BUCKET] [--project=P]
#   launch/tpu_vm.sh run    --name=NAME --zone=ZONE [--project=P] -- train --config=... --workdir=bucket/runs/NAME
#   launch/tpu_vm.sh status | health | logs | delete --name=NAME --zone=ZONE [--project=P]
#
# setup copies the files that git knows, installs into .venv on every host, and mounts BUCKET as the folder `bucket`:
# hosts share no disk, and the workdir must be one for all. run starts what follows `python -m alignvlm_jax`, and does
# not wait; one that is still at work is ended first. The same command goes on with a run that was stopped. health says
# done, running or failed. --dry_run prints the commands.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

action=${1:-}
if [[ "$action" != create && "$action" != setup && "$action" != run && "$action" != status &&
    "$action" != health && "$action" != logs && "$action" != delete ]]; then usage; fi
shift
name='' zone='' project='' type='' runtime='' bucket='' spot=false
read_flags "name zone project type runtime bucket spot!" "$@"
require name zone
where=("--zone=$zone")
if [[ -n "$project" ]]; then where+=("--project=$project"); fi
folder=alignvlm_jax

queued() { run gcloud compute tpus queued-resources "$@" "${where[@]}"; }
on_hosts() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"; }

# The image follows from the type, unless --runtime names another.
runtime_of() {
    case "$1" in
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        v4-*) echo tpu-ubuntu2204-base ;;
    esac
}

create() {
    require type
    if [[ ! "$type" =~ ^(v4|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]]; then
        wrong "--type is '$type'; it must be v5litepod-CHIPS, v6e-CHIPS, v5p-CORES or v4-CORES, such as v5p-128"
    fi
    local options=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=${runtime:-$(runtime_of "$type")}")
    if $spot; then options+=(--spot); fi
    queued create "$name" "${options[@]}"
}

setup() {
    local archive=/tmp/$name.tgz install
    run bash -c "git ls-files -z | tar --null --files-from=- -czf $(printf %q "$archive")"
    run gcloud compute tpus tpu-vm scp "$archive" "$name:$folder.tgz" "${where[@]}" --worker=all
    # The image's Python is 3.10, which is too old.
    install="command -v python3.11 >/dev/null || { sudo apt-get update -qq && sudo apt-get install -qq -y python3.11"
    install+=" python3.11-venv; }; mkdir -p $folder && tar xzf $folder.tgz -C $folder && cd $folder"
    install+=" && make PYTHON=python3.11 tpu-compiler"
    if [[ -n "$bucket" ]]; then
        install+=" && mkdir -p bucket && { mountpoint -q bucket || gcsfuse --implicit-dirs $(printf %q "$bucket") bucket; }"
    fi
    on_hosts all "$install"
}

start() {
    require_command
    local words stop
    printf -v words '%q ' "${command[@]}"
    # Where one host failed the others may still hold their chips, and hear no signal while they wait for it.
    # shellcheck disable=SC2016  # for the host's shell
    stop='if pid=$(cat run.pid) && kill "$pid"; then timeout 60 tail --pid="$pid" -f /dev/null || kill -KILL "$pid"; fi'
    # Detached: a connection that drops must not take the run with it.
    on_hosts all "cd $folder && { $stop; } 2>/dev/null; { ALIGNVLM_AUTO_DISTRIBUTED=1 setsid nohup .venv/bin/python -m alignvlm_jax ${words% } \
>run.log 2>&1 </dev/null & echo \$! >run.pid; }"
}

case "$action" in
    create) create ;;
    setup) setup ;;
    run) start ;;
    status) queued describe "$name" '--format=value(state.state)' ;;
    health)
        # shellcheck disable=SC2016  # for the host's shell
        on_hosts 0 "cd $folder && "'if grep -q "^done: " run.log; then echo done; elif kill -0 "$(cat run.pid)"; '`
            `'then echo running; else echo failed; fi' ;;
    logs) on_hosts 0 "tail -n 100 -F $folder/run.log" ;;
    delete) queued delete "$name" --force --quiet ;;
esac
