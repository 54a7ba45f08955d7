#!/usr/bin/env bash
# Runs a command on TPU slices of a GKE cluster through xpk.
#
#   launch/xpk.sh --cluster=CLUSTER --name=NAME --type=v5p-128 (--image=IMAGE | --base_image=IMAGE) [--num_slices=1]
#       [--zone=Z] [--project=P] [--spot | --reservation=NAME] [--priority=medium] [--storage=NAME ...]
#       [--shared_disk=/PATH] [--env=NAME=VALUE ...] [--grace=600] [--restarts=10]
#       -- train --config=configs/stage2.py:llama31_8b --workdir=gs://BUCKET/runs/NAME
#
# --image is one that `gke_jobset.sh build` made; to --base_image, which has Python with requirements.txt and
# requirements-tpu.txt, xpk adds this folder. A stall and a lost host start the run again, as often as --restarts says,
# wrong input does not. --storage mounts what `xpk storage` knows, at a path of its own. xpk must be installed.
# --dry_run prints the command.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

if (($# == 0)); then usage; fi
# shellcheck disable=SC2034  # some are read by name
cluster='' name='' type='' image='' base_image='' num_slices=1 zone='' project='' spot=false reservation='' priority=''
storage=() shared_disk='' env=() grace=$default_grace restarts=10
read_flags "cluster name type image base_image num_slices zone project spot! reservation priority storage* shared_disk
    env* grace restarts" "$@"
require cluster name type
for count in num_slices restarts grace; do require_count $count; done
require_assignments "${env[@]}"
require_command
require_config
require_shared_workdir
if [[ ! "$type" =~ ^(v5litepod|v5p|v6e|tpu7x)-[1-9][0-9x]*$ ]]; then
    wrong "--type is '$type'; it must be v5litepod-CHIPS, v6e-CHIPS, v5p-CORES or tpu7x-CORES, such as v5p-128"
fi
if [[ -n "$image" && -n "$base_image" || -z "$image$base_image" ]]; then wrong "one of --image and --base_image is needed"; fi
if $spot && [[ -n "$reservation" ]]; then wrong "--spot and --reservation exclude each other"; fi
for one in "${env[@]}"; do
    # xpk writes it between quotes into its YAML, as it stands.
    if [[ "$one" == *[\"\\]* || "$one" == *$'\n'* ]]; then wrong "--env=$one: xpk takes no \", \\ and line ends"; fi
done

options=("--cluster=$cluster" "--workload=$name" "--tpu-type=$type" "--num-slices=$num_slices")
options+=("--max-restarts=$restarts" "--restart-on-exit-codes=$status_fault,$status_stalled,$status_stopped")
options+=("--termination-grace-period-seconds=$grace")
if [[ -n "$image" ]]; then
    options+=("--docker-image=$image")
else
    options+=("--base-docker-image=$base_image" "--script-dir=$root" "--env=ALIGNVLM_COMMIT=$(commit)")
fi
for flag in zone project reservation priority; do
    if [[ -n "${!flag}" ]]; then options+=("--$flag=${!flag}"); fi
done
if $spot; then options+=(--spot); fi
for one in "${storage[@]}"; do options+=("--storage=$one"); done
# Kubernetes makes one $ of two, and replaces $(NAME).
for one in "${env[@]}"; do options+=("--env=${one//\$/\$\$}"); done
printf -v words '%q ' "${command[@]}"
# xpk starts it in a subshell and sends SIGTERM to that: exec makes it the process itself.
words="exec env ALIGNVLM_AUTO_DISTRIBUTED=1 python -m alignvlm_jax ${words% }"
run xpk workload create "${options[@]}" "--command=${words//\$/\$\$}"
