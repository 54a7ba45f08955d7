#!/usr/bin/env bash
# Runs a command on TPU slices of a GKE cluster, as a JobSet (gke_jobset.yaml, filled in).
#
#   launch/gke_jobset.sh build  --image=IMAGE
#   launch/gke_jobset.sh create --name=NAME --image=IMAGE --topology=v5p:4x4x4 [--num_slices=1]
#       [--spot | --reservation=NAME] [--service_account=KSA] [--mount=BUCKET:/PATH ...] [--shared_disk=/PATH]
#       [--env=NAME=VALUE ...] [--grace=600] [--restarts=10]
#       -- train --config=configs/stage2.py:llama31_8b --workdir=gs://BUCKET/runs/NAME
#   launch/gke_jobset.sh status | logs | delete --name=NAME
#
# build makes IMAGE of this folder (launch/Dockerfile) and pushes it. Topologies: v5e:AxB, v6e:AxB, v5p:AxBxC,
# tpu7x:AxBxC. KSA is a Kubernetes service account that may use the buckets; --mount shows a bucket read-only. A run
# that is preempted starts again, a lost host or a stall is counted as one of --restarts, wrong input ends it. logs
# shows the first host. --dry_run prints the JobSet and the commands.
set -euo pipefail
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

action=${1:-}
if [[ ! "$action" =~ ^(build|create|status|logs|delete)$ ]]; then usage; fi
shift
name='' topology='' image='' num_slices=1 spot=false reservation='' service_account='' mount=() shared_disk=''
env=() grace=$default_grace restarts=10
read_flags "name topology image num_slices spot! reservation service_account mount* shared_disk env* grace restarts" "$@"
if [[ "$action" != build ]]; then
    require name
    if [[ ! "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then
        wrong "--name is '$name'; Kubernetes takes up to 40 lower-case letters, digits and -, a letter first"
    fi
fi
set_of_host_0="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0"
set_of_host_0+=",batch.kubernetes.io/job-completion-index=0"

accelerator_of() {
    case "$1" in
        v5e) echo tpu-v5-lite-podslice ;;
        v5p) echo tpu-v5p-slice ;;
        v6e) echo tpu-v6e-slice ;;
        tpu7x) echo tpu7x ;;
    esac
}

# A string in YAML's double quotes.
quoted() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    text=${text//$'\t'/\\t}
    printf '"%s"' "$text"
}

# The same, for a field in which Kubernetes would replace $(NAME): it makes one $ of two.
quoted_whole() { quoted "${1//\$/\$\$}"; }

# Prints the template with the values of `field`. A field that is a line of its own may have several lines, or none.
# What was filled in is not looked at again: it may hold an @NAME@.
fill_template() {
    local line rest indent value
    while IFS= read -r line; do
        rest=$line line=''
        while [[ "$rest" =~ ^([^@]*)@([A-Z_]+)@(.*)$ ]]; do
            indent=${BASH_REMATCH[1]} rest=${BASH_REMATCH[3]} value=${field[${BASH_REMATCH[2]}]}
            if [[ -z "$line$rest$value" && "$indent" =~ ^\ *$ ]]; then continue 2; fi
            line+=$indent${value//$'\n'/$'\n'"$indent"}
        done
        printf '%s\n' "$line$rest"
    done <"$here/gke_jobset.yaml"
}

check_create() {
    require image topology
    require_count restarts
    require_count num_slices
    require_count grace
    require_assignments "${env[@]}"
    parse_topology "$topology"
    require_command
    require_config
    if $spot && [[ -n "$reservation" ]]; then wrong "--spot and --reservation exclude each other"; fi
    if ((num_slices > 1 && hosts == 1)); then
        wrong "--topology=$topology is one host; --num_slices takes slices of two hosts and more"
    fi
    if [[ -n "$service_account" && ! "$service_account" =~ ^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$ ]]; then
        wrong "--service_account is '$service_account'; it must be a Kubernetes service account's name"
    fi
    local one workdir
    workdir=$(value_of --workdir)
    for one in "${mount[@]}"; do
        if [[ ! "$one" =~ ^[a-z0-9][-_.a-z0-9]*:/[^:]+$ ]]; then wrong "--mount is '$one'; it must be BUCKET:/PATH"; fi
        if [[ "$workdir/" == "${one#*:}"/* ]]; then
            wrong "--workdir=$workdir is on a bucket that is mounted read-only; give gs://${one%%:*}/..."
        fi
    done
    require_shared_workdir
}

# What the container runs: the command, with its words kept whole.
container_command() {
    local words
    printf -v words '%q ' "${command[@]}"
    words="exec python -m alignvlm_jax ${words% }"
    if ((num_slices > 1)); then
        # GKE says it to each pod. Without it every slice would run on its own, and all would write one workdir.
        words="[ \"\${MEGASCALE_NUM_SLICES:-1}\" = $num_slices ] || { echo \"MEGASCALE_NUM_SLICES is"`
            `" '\${MEGASCALE_NUM_SLICES:-}', not $num_slices\" >&2; exit $status_usage; }; $words"
    fi
    printf '%s' "$words"
}

fill() {
    local one i=0 annotations='' mounts='' volumes=''
    local -A field=(
        [NAME]=$name [RESTARTS]=$restarts [SLICES]=$num_slices [HOSTS]=$hosts [GRACE]=$grace
        [WRONG]=$status_wrong [USAGE]=$status_usage [STOPPED]=$status_stopped
        [ACCELERATOR]=$(accelerator_of "$kind") [SHAPE]=${topology#*:} [CHIPS_A_HOST]=$((chips / hosts))
        [IMAGE]=$(quoted "$image") [COMMAND]=$(quoted_whole "$(container_command)") [POD]='' [NODES]='' [ENV]=''
    )
    field[ENV]+=$'\n'"- {name: ALIGNVLM_AUTO_DISTRIBUTED, value: \"$((hosts * num_slices > 1))\"}"
    for one in "${env[@]}"; do
        field[ENV]+=$'\n'"- {name: ${one%%=*}, value: $(quoted_whole "${one#*=}")}"
    done
    if [[ -n "$service_account" ]]; then field[POD]+=$'\n'"serviceAccountName: $service_account"; fi
    if [[ -z "$service_account" ]] && ((${#mount[@]} == 0)); then
        # Faster between slices; but there a pod has the node's identity, not that of its service account.
        field[POD]+=$'\nhostNetwork: true\ndnsPolicy: ClusterFirstWithHostNet'
    fi
    if $spot; then field[NODES]+=$'\ncloud.google.com/gke-spot: "true"'; fi
    if [[ -n "$reservation" ]]; then
        field[NODES]+=$'\n'"cloud.google.com/reservation-name: $(quoted "$reservation")"
    fi
    for one in "${mount[@]}"; do
        annotations='gke-gcsfuse/volumes: "true"'
        mounts+=", {name: bucket-$i, mountPath: $(quoted "${one#*:}"), readOnly: true}"
        volumes+=", {name: bucket-$i, csi: {driver: gcsfuse.csi.storage.gke.io, readOnly: true,"`
            `" volumeAttributes: {bucketName: $(quoted "${one%%:*}"), mountOptions: implicit-dirs}}}"
        i=$((i + 1))
    done
    field[ANNOTATIONS]="{$annotations}"
    field[MOUNTS]="[${mounts#, }]"
    field[VOLUMES]="[${volumes#, }]"
    for one in POD NODES ENV; do field[$one]=${field[$one]#$'\n'}; done
    fill_template
}

case "$action" in
    build)
        require image
        run docker build "--file=$root/launch/Dockerfile" "--build-arg=COMMIT=$(commit)" "--tag=$image" "$root"
        run docker push "$image" ;;
    create)
        check_create
        if $dry_run; then
            fill
            echo '---'
            show kubectl apply --filename=-
        else
            fill | run kubectl apply --filename=-
        fi ;;
    status) run kubectl get "jobset/$name" --output=wide ;;
    logs) run kubectl logs "--selector=$set_of_host_0" --container=alignvlm --follow --tail=100 ;;
    delete) run kubectl delete "jobset/$name" ;;
esac
