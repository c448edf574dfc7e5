# Sourced by the stories in this folder, which set OUT: run a stage and note its seconds in $OUT/seconds.tsv.
mkdir -p "$OUT"
touch "$OUT/seconds.tsv"

stage() { # stage NAME COMMAND...
    local name=$1 start=$SECONDS
    shift
    echo "=== $name: $*"
    "$@"
    printf '%s\t%s\n' "$name" $((SECONDS - start)) >> "$OUT/seconds.tsv"
}

recipe() { # recipe SCRIPT ARGUMENTS...: on the accelerate config that ACCELERATE_CONFIG names
    accelerate launch --quiet --config_file "${ACCELERATE_CONFIG:-accelerate_configs/cpu.yaml}" "$@"
}
