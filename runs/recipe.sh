#!/usr/bin/env bash
# Run a recipe folder from text to a chat model, or continue where it stopped:
#     bash runs/recipe.sh FOLDER
#     bash runs/recipe.sh FOLDER --dry_run    # check every stage within a minute, and run nothing
# recipes/README.md describes the folder: one YAML for each stage below. A stage without its file is skipped.
set -euo pipefail
usage() {
    echo "error: $1; usage: bash runs/recipe.sh FOLDER [--dry_run]" >&2
    exit 2
}
[ $# -ge 1 ] || usage "give a recipe folder"
[ -f "$1/recipe.yaml" ] || usage "there is no $1/recipe.yaml"
[ "${2:---dry_run}" = --dry_run ] && [ $# -le 2 ] || usage "unknown option ${2:-}"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." # all paths of a recipe are relative to the repository
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then
    export PATH=$PWD/.venv/bin:$PATH
fi

# value FILE KEY: print a value of a YAML file of the recipe; nothing if the file or the key is absent. As in the scripts,
# the file may begin with the values of another (`defaults`).
value() {
    [ ! -e "$folder/$1" ] || python -c 'import pathlib, sys, yaml
file = pathlib.Path(sys.argv[1])
content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
if "defaults" in content:
    content = yaml.safe_load((file.parent / content["defaults"]).read_text(encoding="utf-8")) | content
print(content.get(sys.argv[2]) or "")' "$folder/$1" "$2"
}

if [ $# -eq 2 ]; then
    exec python runs/dry_run.py "$folder"
fi

OUT=$(value recipe.yaml output)
[ -n "$OUT" ] || usage "$1/recipe.yaml has no \`output\`"
ACCELERATE_CONFIG=$(value recipe.yaml accelerate_config)
[ ! -e "$folder/accelerate.yaml" ] || ACCELERATE_CONFIG=$folder/accelerate.yaml
threads=$(value recipe.yaml threads)
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${threads:-$((cores < 8 ? cores : 8))}} TOKENIZERS_PARALLELISM=false

# Defines `stage NAME COMMAND`, which runs and times a command, and `recipe SCRIPT`, which runs `accelerate launch`.
. runs/stages.sh

# run NAME COMMAND...: run the stage NAME with the config FOLDER/NAME.yaml, if there is one.
run() {
    [ ! -e "$folder/$1.yaml" ] || stage "$@" --config "$folder/$1.yaml"
}

# The bundled sample, for recipes that use its chats. Tokenizer and token shards.
run sample python data/sample/make_sample.py
run tokenizer python tokenizer/train_tokenizer.py
run data python data/prepare_pretrain.py

# Pretraining, and a second stage of it with other text, from the first one's checkpoint.
run pretrain recipe pretrain/pretrain.py
run anneal_data python data/prepare_pretrain.py
run anneal recipe pretrain/pretrain.py

# Supervised fine-tuning on chats, then preference optimization on pairs of answers.
run chat python data/convert_chat.py --kind sft
run sft recipe sft/sft.py
run pairs python data/convert_chat.py --kind preference
run dpo recipe rlhf/dpo.py

# Task files of local exams, scores with a report, and the last checkpoint as a stock architecture.
run exams python eval/local_exams.py
run eval python eval/run_eval.py
results=$(value eval.yaml output)
[ -z "$results" ] || stage report python eval/report.py --results "$results" --output "$OUT/report.md"
for last in dpo sft anneal pretrain; do
    checkpoint=$(value $last.yaml output_dir)
    [ -z "$checkpoint" ] || break
done
if [ -n "$checkpoint" ]; then
    [ "$(value recipe.yaml export)" = none ] ||
        stage export python export/to_native.py --checkpoint "$checkpoint" --output "$OUT/native"
    echo "Next: make chat MODEL=$checkpoint"
fi
