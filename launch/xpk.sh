#!/usr/bin/env bash
# Runs a command on TPU slices of a GKE cluster through xpk, which builds the image from this folder.
#
#   launch/xpk.sh --cluster=CLUSTER --name=NAME --type=v5p-128 --base_image=IMAGE [--slices=1] [--zone=Z] [--project=P]
#       [--restarts=10] -- train --config=configs/stage2.py:llama31_8b --workdir=/data/runs/NAME
#
# IMAGE has Python with requirements.txt and requirements-tpu.txt. xpk must be installed. --dry_run prints the command.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

if (($# == 0)); then usage; fi
cluster='' name='' type='' base_image='' slices=1 restarts=10 zone='' project=''
read_flags "cluster name type base_image slices restarts zone project" "$@"
require cluster name type base_image
require_count slices
require_count restarts
require_command
if [[ ! "$type" =~ ^(v5litepod|v5p|v6e)-[1-9][0-9]*$ ]]; then
    wrong "--type is '$type'; it must be v5litepod-CHIPS, v6e-CHIPS or v5p-CORES, such as v5p-128"
fi
options=("--cluster=$cluster" "--workload=$name" "--tpu-type=$type" "--num-slices=$slices" "--max-restarts=$restarts")
options+=("--base-docker-image=$base_image" "--script-dir=$(cd "$(dirname "$0")/.." && pwd)")
if [[ -n "$zone" ]]; then options+=("--zone=$zone"); fi
if [[ -n "$project" ]]; then options+=("--project=$project"); fi
printf -v words '%q ' "${command[@]}"
run xpk workload create "${options[@]}" \
    "--command=ALIGNVLM_AUTO_DISTRIBUTED=1 python -m alignvlm_jax ${words% }"
