#!/usr/bin/env bash
# Runs a command on a TPU slice of a GKE cluster, as a JobSet (gke_jobset.yaml, filled in).
#
#   launch/gke_jobset.sh create --name=NAME --topology=v5p:4x4x4 --image=IMAGE [--spot] [--restarts=10]
#       -- train --config=configs/stage2.py:llama31_8b --workdir=/data/runs/NAME
#   launch/gke_jobset.sh status | logs | delete --name=NAME
#
# IMAGE holds this repository as its working directory, and `python` with requirements.txt and requirements-tpu.txt. The
# workdir must be one for all hosts, such as a mounted bucket. --dry_run prints the JobSet and the commands.
set -euo pipefail
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

action=${1:-}
if [[ "$action" != create && "$action" != status && "$action" != logs && "$action" != delete ]]; then usage; fi
shift
name='' topology='' image='' restarts=10 spot=false
read_flags "name topology image restarts spot!" "$@"
require name
if [[ ! "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then
    wrong "--name is '$name'; Kubernetes takes up to 40 lower-case letters, digits and -, a letter first"
fi

accelerator_of() {
    case "$1" in
        v5e) echo tpu-v5-lite-podslice ;;
        v5p) echo tpu-v5p-slice ;;
        v6e) echo tpu-v6e-slice ;;
    esac
}

# The whole template with its fields filled in.
fill() {
    local words text spot_selector=''
    printf -v words '%q ' "${command[@]}"
    words="exec python -m alignvlm_jax ${words% }"
    # As a YAML string in double quotes.
    words=${words//\\/\\\\}
    words=\"${words//\"/\\\"}\"
    if $spot; then spot_selector='cloud.google.com/gke-spot: "true"'; fi
    text=$(<"$here/gke_jobset.yaml")
    text=${text//@NAME@/"$name"}
    text=${text//@RESTARTS@/"$restarts"}
    text=${text//@HOSTS@/"$hosts"}
    text=${text//@ACCELERATOR@/"$(accelerator_of "$kind")"}
    text=${text//@SHAPE@/"${topology#*:}"}
    text=${text//@SPOT@/"$spot_selector"}
    text=${text//@IMAGE@/"$image"}
    text=${text//@CHIPS_A_HOST@/"$((chips / hosts))"}
    echo "${text//@COMMAND@/"$words"}"
}

case "$action" in
    create)
        require topology image
        require_count restarts
        parse_topology "$topology"
        require_command
        if $dry_run; then
            fill
            echo '---'
            show kubectl apply --filename=-
        else
            fill | run kubectl apply --filename=-
        fi ;;
    status) run kubectl get "jobset/$name" --output=wide ;;
    logs) run kubectl logs "job/$name-slice-0" --follow --tail=100 ;;
    delete) run kubectl delete "jobset/$name" ;;
esac
