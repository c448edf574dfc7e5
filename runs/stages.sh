# Functions for the scripts in this folder. They set OUT, the folder of the run, and then source this file.
mkdir -p "$OUT"
touch "$OUT/seconds.tsv" # a line per attempt at a stage: NAME, seconds, `done` or `stopped`

# OpenMP threads that wait for each other spin, and a busy machine then runs several times slower. A short spin costs
# nothing on an idle machine.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}

# stage NAME COMMAND...: run a command and record its seconds. A stage that an earlier call completed is skipped.
stage() {
    current=$1
    shift
    if grep -qE "^$current[[:space:]][0-9]+[[:space:]]done$" "$OUT/seconds.tsv"; then
        echo "=== $current: completed earlier"
        return
    fi
    echo "=== $current: $*"
    started=$SECONDS
    trap 'record stopped' EXIT
    "$@"
    trap - EXIT
    record "done"
}

record() { # record done|stopped
    printf '%s\t%s\t%s\n' "$current" $((SECONDS - started)) "$1" >> "$OUT/seconds.tsv"
}

# recipe SCRIPT ARGUMENTS...: launch training on the hardware of ACCELERATE_CONFIG (default: CPU).
recipe() {
    accelerate launch --quiet --config_file "${ACCELERATE_CONFIG:-accelerate_configs/cpu.yaml}" "$@"
}
