#!/usr/bin/env bash
# Rents Cloud TPU slices through a queued resource and runs a command on all of their hosts.
#
#   launch/tpu_vm.sh create --name=NAME --zone=ZONE --type=v5p-128 [--num_slices=1] [--runtime=R] [--spot | --reserved]
#       [--network=N] [--subnetwork=S] [--internal_ips] [--service_account=A] [--valid_until_duration=6h]
#   launch/tpu_vm.sh setup  --name=NAME --zone=ZONE
#   launch/tpu_vm.sh run    --name=NAME --zone=ZONE [--env=NAME=VALUE ...] [--grace=600] [--shared_disk=/PATH]
#       -- train --config=... --workdir=gs://BUCKET/runs/NAME
#   launch/tpu_vm.sh health --name=NAME --zone=ZONE [-- train ...]
#   launch/tpu_vm.sh status | logs | delete --name=NAME --zone=ZONE
#
# All take --project=P, and --tunnel_through_iap or --internal_ip for hosts without an address of their own. setup
# copies the files that git knows or would add, and installs into .venv on every host. run starts what follows `python
# -m alignvlm_jax`, and does not wait; one that is still at work is told to stop and has --grace seconds to save. The
# same command goes on with a run that was stopped. health asks all hosts and says running, done, failed with a status,
# absent, or other: another command than the one given is at work. --dry_run prints the commands.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

action=${1:-}
if [[ ! "$action" =~ ^(create|setup|run|status|health|logs|delete)$ ]]; then usage; fi
shift
# shellcheck disable=SC2034  # some are read by name
{
    name='' zone='' project='' type='' runtime='' num_slices=1 spot=false reserved=false network='' subnetwork=''
    internal_ips=false service_account='' valid_until_duration='' internal_ip=false tunnel_through_iap=false
    env=() grace=$default_grace shared_disk=''
}
read_flags "name zone project type runtime num_slices spot! reserved! network subnetwork internal_ips! service_account
    valid_until_duration internal_ip! tunnel_through_iap! env* grace shared_disk" "$@"
require name zone
where=("--zone=$zone")
if [[ -n "$project" ]]; then where+=("--project=$project"); fi
way=()
if $internal_ip; then way+=(--internal-ip); fi
if $tunnel_through_iap; then way+=(--tunnel-through-iap); fi
every_host=(--node=all --worker=all --batch-size=all)
first_host=(--node=0 --worker=0)
folder=alignvlm_jax

queued() { run gcloud compute tpus queued-resources "$@" "${where[@]}"; }
on_every_host() { queued ssh "$name" "${every_host[@]}" "${way[@]}" "--command=$1"; }
on_first_host() { queued ssh "$name" "${first_host[@]}" "${way[@]}" "--command=$1"; }

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
    require_count num_slices
    if [[ "$type" == tpu7x-* ]]; then
        wrong "--type is '$type': the Cloud TPU API has no TPU7x; gke_jobset.sh and xpk.sh take it"
    fi
    if [[ ! "$type" =~ ^(v4|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]]; then
        wrong "--type is '$type'; it must be v5litepod-CHIPS, v6e-CHIPS, v5p-CORES or v4-CORES, such as v5p-128"
    fi
    if $spot && $reserved; then wrong "--spot and --reserved exclude each other"; fi
    local options=("--accelerator-type=$type" "--runtime-version=${runtime:-$(runtime_of "$type")}") flag
    if ((num_slices > 1)); then
        options+=("--node-count=$num_slices" "--node-prefix=$name")
    else
        options+=("--node-id=$name")
    fi
    for flag in spot reserved internal_ips; do
        if ${!flag}; then options+=("--${flag//_/-}"); fi
    done
    for flag in network subnetwork service_account valid_until_duration; do
        if [[ -n "${!flag}" ]]; then options+=("--${flag//_/-}=${!flag}"); fi
    done
    queued create "$name" "${options[@]}"
}

setup() {
    local archive=/tmp/$name.tgz pack install
    if ! is_checkout; then wrong "$root is no git checkout: setup copies what git knows"; fi
    # What git knows or would add; not what was deleted and is not committed.
    pack="cd $(printf %q "$root") && git ls-files -z --cached --others --exclude-standard | "
    pack+="{ while IFS= read -rd '' file; do if [ -e \"\$file\" ]; then printf '%s\\0' \"\$file\"; fi; done; } | "
    pack+="tar --null --files-from=- -czf $(printf %q "$archive")"
    run bash -c "set -o pipefail; $pack"
    queued scp "$archive" "$name:$folder.tgz" "${every_host[@]}" "${way[@]}"
    # The image's Python is 3.10, which is too old. The archive has no .git: a checkpoint's metadata name this commit.
    install="command -v python3.11 >/dev/null || { sudo apt-get update -qq && sudo apt-get install -qq -y python3.11"
    install+=" python3.11-venv; }; mkdir -p $folder && tar xzf $folder.tgz -C $folder && cd $folder"
    install+=" && echo $(commit) >COMMIT && make PYTHON=python3.11 tpu-compiler"
    on_every_host "$install"
}

# For the hosts' shells: whether what run.pid names is a run of ours. After a restart of the host it may be anything.
# shellcheck disable=SC2016
alive='alive() { pid=$(cat run.pid 2>/dev/null) && grep -qs alignvlm_jax "/proc/$pid/cmdline"; }'

start() {
    require_command
    require_assignments "${env[@]}"
    require_count grace
    require_config
    require_shared_workdir
    local words settings stop started
    words=$(spell "${command[@]}")
    settings=$(spell env ALIGNVLM_AUTO_DISTRIBUTED=1 "${env[@]}")
    # Where one host failed the others may still hold their chips, and hear no signal while they wait for it.
    # shellcheck disable=SC2016  # for the host's shell
    stop='if alive; then kill -TERM -- "-$pid"; timeout '$grace' tail --pid="$pid" -f /dev/null || kill -KILL -- "-$pid"; fi'
    # The shell around it hears the SIGTERM of the group, too: it lives on to write the status down.
    started="trap : TERM; $settings .venv/bin/python -m alignvlm_jax $words; echo \$? >run.status"
    # Detached: a connection that drops must not take the run with it.
    on_every_host "cd $folder || exit; $alive; { $stop; } 2>/dev/null; rm -f run.status; echo $(printf %q "$words") >run.command; "`
        `"setsid nohup bash -c $(printf %q "$started") >>run.log 2>&1 </dev/null & echo \$! >run.pid"
}

# Says how the run is from what all hosts say: the worst of it.
health() {
    local words ask said hosts status
    words=$(spell "${command[@]}")
    ask="cd $folder 2>/dev/null || { echo health: absent; exit; }; $alive; "
    ask+="if [ ! -e run.pid ]; then echo health: absent; "
    if ((${#command[@]})); then
        ask+="elif [ \"\$(cat run.command)\" != $(printf %q "$words") ]; then if alive; then echo health: other; "
        ask+="else echo health: absent; fi; "
    fi
    ask+="elif alive; then echo health: running; else echo \"health: status \$(cat run.status 2>/dev/null || echo 137)\"; fi"
    if $dry_run; then
        on_every_host "$ask"
        return
    fi
    said=$(on_every_host "$ask" | sed -n 's/^health: //p')
    hosts=$(wc -l <<<"$said")
    if [[ -z "$said" ]]; then
        echo "tpu_vm.sh: error: no host answered" >&2
        exit 1
    fi
    # Wrong input first: it explains the others, and starting again does not mend it.
    status=$(sed -n 's/^status //p' <<<"$said" | awk '$1 != 0 {print ($1 <= 2 ? 0 : 1), $1}' | sort -n | sed -n '1s/.* //p')
    if grep -qx other <<<"$said"; then
        echo other
    elif [[ -n "$status" ]]; then
        echo "failed with status $status"
    elif ! grep -qvx absent <<<"$said"; then
        echo absent
    elif grep -qx absent <<<"$said"; then
        echo "failed with status 137"  # a host was made anew beneath the run
    elif grep -qx running <<<"$said"; then
        echo "running on $hosts hosts"
    else
        echo 'done'
    fi
}

case "$action" in
    create) create ;;
    setup) setup ;;
    run) start ;;
    status) queued describe "$name" '--format=value(state.state)' ;;
    health) health ;;
    logs) on_first_host "tail -n 100 -F $folder/run.log" ;;
    delete) queued delete "$name" --force --quiet ;;
esac
