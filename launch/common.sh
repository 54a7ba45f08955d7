# Sourced by the launch scripts: usage, flags, and commands that --dry_run only prints.
# shellcheck shell=bash disable=SC2034  # what a script that sources this reads

dry_run=false
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Seconds from the wish to stop to the KILL: longer than a step and a save. `plan` prints what a run needs.
default_grace=600

# Exit statuses of `python -m alignvlm_jax`. What is neither done nor wrong may be started again.
status_wrong=1    # input that is wrong stays wrong
status_usage=2
status_fault=70   # an exception that nobody expected, such as the loss of another host
status_stalled=75 # no step for too long, another host lost or late, a storage that does not answer
status_stopped=143 # was told to stop, and has saved

# Commands that several processes run as one, and the flag without which they do not.
joining=(train evaluate "inspect --analysis")

# The comment at the head of the calling script is its usage.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit "${1:-2}"
}
if [[ "${1:-}" =~ ^(--help|-h)$ ]]; then usage 0; fi

# Wrong usage: one line, and status 2.
wrong() {
    echo "${0##*/}: error: $1" >&2
    exit 2
}

# Reads --name=value flags into variables of their names (a - in a name is taken as _), up to `--`; what follows it is
# the command, in `command`. The first argument lists the flags: NAME! takes no value, NAME* may come several times and
# is an array. Locals begin with _: they would otherwise take the place of flags of the same names.
command=()
read_flags() {
    local _known _flag _name
    read -rd '' -a _known <<<"$1" || true
    _known=" ${_known[*]} "
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
        _name=${_name//-/_}
        if [[ "$_flag" == --* && "$_flag" != *=* && "$_name" == dry_run ]]; then
            dry_run=true
        elif [[ "$_flag" == --*=?* && "$_known" == *" $_name "* ]]; then
            printf -v "$_name" %s "${_flag#*=}"
        elif [[ "$_flag" == --*=?* && "$_known" == *" $_name* "* ]]; then
            local -n _array=$_name
            _array+=("${_flag#*=}")
            unset -n _array
        elif [[ "$_flag" == --* && "$_flag" != *=* && "$_known" == *" $_name! "* ]]; then
            printf -v "$_name" true
        else
            _known=${_known//[\!\*]/}
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

# Ends with status 2 unless each of the given words is NAME=VALUE, as --env takes it.
require_assignments() {
    local word
    for word in "$@"; do
        if [[ ! "$word" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; then wrong "--env is '$word'; it must be NAME=VALUE"; fi
    done
}

# Ends with status 2 unless `--` is followed by a command that several hosts run as one.
require_command() {
    if ((${#command[@]} == 0)); then wrong "no command after --, such as: -- train --config=configs/stage2.py ..."; fi
    local one
    for one in "${joining[@]}"; do
        if [[ "${command[0]}" == "${one% *}" && " ${command[*]}" == *" ${one#* }"* ]]; then return; fi
    done
    printf -v one ', %s' "${joining[@]}"
    wrong "'${command[0]}' cannot be started on several hosts; these can: ${one#, }"
}

# Ends with status 2 where the command writes to a folder that each host has for itself: a checkpoint of one host is no
# checkpoint, and with the host it is gone. Paths on gs:// are fine, and those below `shared_disk`, where it is set.
require_shared_workdir() {
    local flag path
    for flag in --workdir --checkpoint; do
        path=$(value_of "$flag")
        if [[ -z "$path" || "$path" == gs://?* ]]; then continue; fi
        if [[ -n "${shared_disk:-}" && "${path%/}/" == "${shared_disk%/}"/* ]]; then continue; fi
        wrong "$flag=$path is each host's own disk; give gs://BUCKET/..., or name the folder that all hosts share: "`
            `"--shared_disk=PATH"
    done
}

# Prints the value of a flag of the command, given as --flag=VALUE or --flag VALUE; nothing without it.
value_of() {
    local i
    for ((i = 0; i < ${#command[@]}; i++)); do
        if [[ "${command[i]}" == "$1="* ]]; then
            echo "${command[i]#*=}"
        elif [[ "${command[i]}" == "$1" ]]; then
            echo "${command[i + 1]:-}"
        fi
    done | tail -n 1
}

# Ends with status 2 unless the config file that the command names is here and goes where the code goes.
require_config() {
    local config
    config=$(value_of --config)
    config=${config%%:*}
    if [[ -z "$config" ]]; then return; fi
    # A name, which is looked up in configs/ on the hosts too.
    if [[ "$config" != */* && "$config" != *.py ]]; then config=configs/$config.py; fi
    if [[ "$config" == /* ]]; then wrong "--config=$config is no path from the root of the checkout, as configs/stage2.py"; fi
    if [[ ! -f "$root/$config" ]]; then wrong "--config=$config is not in $root"; fi
    if is_checkout && [[ -z "$(cd "$root" && git ls-files --cached --others --exclude-standard -- "$config")" ]]; then
        wrong "--config=$config is ignored by git, and does not go to the hosts; move it, such as to configs/"
    fi
}

is_checkout() { git -C "$root" rev-parse --git-dir >/dev/null 2>&1; }

# Prints the commit of the checkout, with -dirty where a file differs from it; `unknown` outside of one.
commit() {
    if ! is_checkout; then
        echo unknown
    elif [[ -n "$(git -C "$root" --no-optional-locks status --porcelain)" ]]; then
        echo "$(git -C "$root" rev-parse HEAD)-dirty"
    else
        git -C "$root" rev-parse HEAD
    fi
}

# Prints words as a shell reads them, on one line: for commands within commands.
spell() {
    local words
    printf -v words '%q ' "$@"
    echo "${words% }"
}

# Sets quoted to a word as one would type it: bare where the shell leaves it alone, else in single quotes, of a flag
# only its value.
quote() {
    if [[ "$1" =~ ^[A-Za-z0-9_./:=@%+,^-]+$ ]]; then
        quoted=$1
    elif [[ "$1" =~ ^(--[A-Za-z0-9_.-]+=|[A-Z_]+=)(.+)$ ]]; then
        local flag=${BASH_REMATCH[1]}
        quote "${BASH_REMATCH[2]}"
        quoted=$flag$quoted
    elif [[ "$1" == *[[:cntrl:]]* ]]; then  # A line break in quotes would end the line that is shown.
        printf -v quoted %q "$1"
    else
        quoted="'${1//\'/\'\\\'\'}'"
    fi
}

# Prints words as they can be typed: on one line, or where that is too long a flag a line.
show() {
    local word quoted line='' broken=''
    for word in "$@"; do
        quote "$word"
        line+="${line:+ }$quoted"
        if [[ "$word" == -* || "$word" == [A-Z_]*=* ]]; then
            broken+=" \\"$'\n    '"$quoted"
        else
            broken+="${broken:+ }$quoted"
        fi
    done
    if ((${#line} <= 100)); then echo "$line"; else echo "$broken"; fi
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

# Sets kind, chips and hosts from a topology such as v5p:4x4x4, or ends with status 2. Slices of eight v5e or v6e chips
# are one host; all others have four chips a host.
parse_topology() {
    local sizes size dimensions=3
    if [[ ! "$1" =~ ^(v5e|v5p|v6e|tpu7x):[0-9]+(x[0-9]+)+$ ]]; then
        wrong "--topology is '$1'; it must be v5e:AxB, v6e:AxB, v5p:AxBxC or tpu7x:AxBxC, such as v5p:4x4x4"
    fi
    kind=${1%%:*}
    IFS=x read -ra sizes <<<"${1#*:}"
    if [[ "$kind" == v5e || "$kind" == v6e ]]; then dimensions=2; fi
    if ((${#sizes[@]} != dimensions)); then wrong "--topology is '$1'; $kind has $dimensions dimensions"; fi
    chips=1
    for size in "${sizes[@]}"; do ((chips *= size)); done
    if ((chips < 4 || chips % 4)); then wrong "--topology is '$1': $chips chips; slices have 4 at least, in fours"; fi
    if ((dimensions == 2 && chips == 8)); then hosts=1; else hosts=$((chips / 4)); fi
}
