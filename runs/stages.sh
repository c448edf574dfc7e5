# Functions for the scripts in this folder. They set OUT, the folder of the run, and then source this file.
mkdir -p "$OUT"
touch "$OUT/seconds.tsv"

# stage NAME COMMAND...: run a command and append NAME and its seconds to $OUT/seconds.tsv.
stage() {
    local name=$1 start=$SECONDS
    shift
    echo "=== $name: $*"
    "$@"
    printf '%s\t%s\n' "$name" $((SECONDS - start)) >> "$OUT/seconds.tsv"
}

# recipe SCRIPT ARGUMENTS...: launch training on the hardware of ACCELERATE_CONFIG (default: CPU).
recipe() {
    accelerate launch --quiet --config_file "${ACCELERATE_CONFIG:-accelerate_configs/cpu.yaml}" "$@"
}
