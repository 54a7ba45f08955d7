# Sourced by the launch scripts: usage, flags, and commands that --dry_run only prints.
# shellcheck shell=bash

dry_run=false

# The comment at the head of the calling script is its usage.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# Wrong usage: one line, and status 2.
wrong() {
    echo "${0##*/}: error: $1" >&2
    exit 2
}

# Reads --name=value flags into variables of their names, up to `--`; what follows it is the command, in `command`.
# The first argument lists the flags, those without a value with a `!` behind them. Locals begin with _: they would
# otherwise take the place of flags of the same names.
command=()
read_flags() {
    local _known=" $1 " _flag _name
    shift
    while (($#)); do
        _flag=$1
        shift
        if [[ "$_flag" == -- ]]; then
            command=("$@")
            return
        fi
        _name=${_flag#--}
        _name=${_name%%=*}
        if [[ "$_flag" == --dry_run ]]; then
            dry_run=true
        elif [[ "$_flag" == --*=?* && "$_known" == *" $_name "* ]]; then
            printf -v "$_name" %s "${_flag#*=}"
        elif [[ "$_flag" == --* && "$_flag" != *=* && "$_known" == *" $_name! "* ]]; then
            printf -v "$_name" true
        else
            _known=${_known//!/}
            wrong "unknown flag $_flag; flags:${_known// / --}dry_run"
        fi
    done
}

# Ends with status 2 unless each of the named variables is set.
require() {
    local _name
    for _name in "$@"; do
        if [[ -z "${!_name:-}" ]]; then wrong "--$_name=... is missing"; fi
    done
}

# Ends with status 2 unless a variable is a whole number of at least 1.
require_count() {
    if [[ ! "${!1}" =~ ^[1-9][0-9]*$ ]]; then wrong "--$1 is '${!1}'; it must be a whole number of at least 1"; fi
}

# Ends with status 2 without a command after `--`.
require_command() {
    if ((${#command[@]} == 0)); then wrong "no command after --, such as: -- train --config=configs/stage2.py ..."; fi
}

# Prints a command as it can be typed, on one line.
show() {
    local words
    printf -v words '%q ' "$@"
    echo "${words% }"
}

# Runs a command; with --dry_run prints it.
run() {
    if $dry_run; then
        show "$@"
        return
    fi
    if ! type "$1" >/dev/null 2>&1; then
        echo "${0##*/}: error: $1 is not installed; --dry_run prints what it would be asked" >&2
        exit 1
    fi
    "$@"
}

# Sets kind, chips and hosts from a topology such as v5p:4x4x4, or ends with status 2.
# shellcheck disable=SC2034  # hosts is for who sources this
# Slices of up to eight v5e or v6e chips are one host; all others have four chips a host.
parse_topology() {
    local sizes size dimensions=2
    if [[ ! "$1" =~ ^(v5e|v5p|v6e):[0-9]+(x[0-9]+)+$ ]]; then
        wrong "--topology is '$1'; it must be v5e:AxB, v6e:AxB or v5p:AxBxC, such as v5p:4x4x4"
    fi
    kind=${1%%:*}
    IFS=x read -ra sizes <<<"${1#*:}"
    if [[ "$kind" == v5p ]]; then dimensions=3; fi
    if ((${#sizes[@]} != dimensions)); then wrong "--topology is '$1'; $kind has $dimensions dimensions"; fi
    chips=1
    for size in "${sizes[@]}"; do ((chips *= size)); done
    if ((chips < 4 || chips % 4)); then wrong "--topology is '$1': $chips chips; slices have 4 at least, in fours"; fi
    if [[ "$kind" != v5p ]] && ((chips == 8)); then hosts=1; else hosts=$((chips / 4)); fi
}
