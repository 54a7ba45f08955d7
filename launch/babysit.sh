#!/usr/bin/env bash
# Keeps a run on a (spot) TPU slice going until it is done: rents the slice, sets it up, starts the command, and does so
# again when the slice is taken away. The command goes on from its newest checkpoint.
#
#   launch/babysit.sh --name=NAME --zone=ZONE --type=v5p-128 [--spot] [--bucket=BUCKET] [--project=P] [--runtime=R]
#       [--max_creates=20] [--max_failures=3] [--every=60] -- train --config=... --workdir=bucket/runs/NAME
#
# It gives up after max_creates slices, or when the command itself has failed max_failures times in a row. Every so many
# seconds it looks; a question that fails is asked again. The slice is deleted when the run is done. --dry_run prints the
# commands of one round.
set -euo pipefail
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

name='' zone='' project='' type='' runtime='' bucket='' spot=false max_creates=20 max_failures=3 every=60
if (($# == 0)); then usage; fi
read_flags "name zone project type runtime bucket spot! max_creates max_failures every" "$@"
require name zone type
require_command
for count in max_creates max_failures every; do require_count $count; done
common=("--name=$name" "--zone=$zone")
if [[ -n "$project" ]]; then common+=("--project=$project"); fi
rent=("--type=$type")
if [[ -n "$runtime" ]]; then rent+=("--runtime=$runtime"); fi
if $spot; then rent+=(--spot); fi
mount=()
if [[ -n "$bucket" ]]; then mount=("--bucket=$bucket"); fi

tpu() {
    local action=$1
    shift
    "$here/tpu_vm.sh" "$action" "${common[@]}" "$@"
}

if $dry_run; then
    tpu create "${rent[@]}" --dry_run
    tpu status --dry_run
    tpu setup "${mount[@]}" --dry_run
    tpu run --dry_run -- "${command[@]}"
    tpu health --dry_run
    tpu delete --dry_run
    exit 0
fi

say() { echo "$(date +%FT%T) $1"; }

why=$(mktemp)
trap 'rm -f "$why"' EXIT
creates=0 failures=0 started=false last=''
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
        ACTIVE)
            if ! $started; then
                # A slice may be taken away again meanwhile: the next round sees it.
                if tpu setup "${mount[@]}" && tpu run -- "${command[@]}"; then started=true; fi
            else
                health=$(tpu health 2>/dev/null) || health=unreachable
                case "$health" in
                    *done)
                        say "the run is done"
                        tpu delete
                        exit 0 ;;
                    *running) failures=0 ;;
                    *failed)
                        failures=$((failures + 1))
                        if ((failures > max_failures)); then
                            echo "babysit.sh: error: the command failed $failures times; see tpu_vm.sh logs" >&2
                            exit 1
                        fi
                        say "the command failed, starting it again ($failures of $max_failures)"
                        tpu run -- "${command[@]}" || true ;;
                    *) say "no answer from $name" ;;
                esac
            fi ;;
        NONE | SUSPENDED | SUSPENDING | FAILED | PREEMPTED | DELETING)
            started=false
            if ((creates >= max_creates)); then
                echo "babysit.sh: error: rented $creates slices, which is --max_creates" >&2
                exit 1
            fi
            if [[ "$state" != NONE ]]; then tpu delete || true; fi
            creates=$((creates + 1))
            tpu create "${rent[@]}" || say "cannot rent it now" ;;
        *) ;;  # Waiting for its turn, being made, or not to be reached now.
    esac
    sleep "$every"
done
