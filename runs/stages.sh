# Functions for the scripts in this folder. They set OUT, the folder of the run, and then source this file.
mkdir -p "$OUT"
touch "$OUT/seconds.tsv" # a line per attempt at a stage: NAME, seconds, `done` or `stopped`, CPU seconds

# OpenMP threads that wait for each other spin, and a busy machine then runs several times slower. A short spin costs
# nothing on an idle machine.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}

# stage NAME COMMAND...: run a command and record its seconds. A stage that an earlier call completed is skipped. CPU
# seconds, those of all processes of the command, depend less on what else the machine does.
stage() {
    current=$1
    shift
    if grep -qE "^$current[[:space:]][0-9]+[[:space:]]done" "$OUT/seconds.tsv"; then
        echo "=== $current: completed earlier"
        return
    fi
    echo "=== $current: $*"
    cpu_seconds
    started=$SECONDS cpu_started=$cpu
    trap 'record stopped; echo "stopped in $current: the same command continues there" >&2' EXIT
    "$@"
    trap - EXIT
    record "done"
}

record() { # record done|stopped
    cpu_seconds
    printf '%s\t%s\t%s\t%s\n' "$current" $((SECONDS - started)) "$1" $((cpu - cpu_started)) >> "$OUT/seconds.tsv"
}

cpu_seconds() { # set `cpu` to the CPU seconds of all commands so far
    times > "$OUT/times.$$" # $(times) would count those of its own subshell
    cpu=$(awk -F'[ms ]+' 'NR == 2 { printf "%.0f", 60 * $1 + $2 + 60 * $3 + $4 }' "$OUT/times.$$")
    rm "$OUT/times.$$"
}

# recipe SCRIPT ARGUMENTS...: launch training on the hardware of ACCELERATE_CONFIG (default: CPU).
recipe() {
    accelerate launch --quiet --config_file "${ACCELERATE_CONFIG:-accelerate_configs/cpu.yaml}" "$@"
}
