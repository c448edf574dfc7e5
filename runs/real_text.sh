#!/usr/bin/env bash
# Run the whole chain on your own text in about half an hour on a CPU, or in HOURS=2 on more:
#     bash runs/real_text.sh TEXT                     # a folder of .txt, .md, .jsonl, .parquet, ..., also compressed
#     bash runs/real_text.sh TEXT --instructions FILE... --preferences FILE... --cmmlu DIR --ceval DIR
# Every option may be left out: chat rows then come from the bundled sample, and without exams only held-out text is
# scored. `--text_column NAME` names the column of the text if it is not `text`, `--eval_fraction 0.1` holds out more of a
# few documents. Files of instructions and preferences have any schema that data/convert_chat.py knows.
#
# This is runs/new.py for a CPU: it writes the recipe outputs/real_text, which then runs. The same command continues it.
set -euo pipefail
usage() {
    echo "error: $1; usage: bash runs/real_text.sh TEXT [--text_column NAME] [--eval_fraction NUMBER]" \
        "[--instructions FILE...] [--preferences FILE...] [--cmmlu DIR] [--ceval DIR]" >&2
    exit 2
}
text=() chat=() pairs=() more=() option=text
for word in "$@"; do
    case $word in
        --text_column | --eval_fraction | --instructions | --preferences | --cmmlu | --ceval) option=${word#--} && continue ;;
        -*) usage "unknown option $word" ;;
    esac
    path=$word
    [[ $word == /* ]] || path=$PWD/$word
    [[ $option == text_column || $option == eval_fraction || -e $path ]] || usage "there is no $word"
    case $option in
        text) text+=("$path") ;;
        instructions) chat+=("$path") ;;
        preferences) pairs+=("$path") ;;
        text_column | eval_fraction) more+=("--$option" "$word") ;;
        cmmlu | ceval) more+=("--$option" "$path") ;;
    esac
done
[ ${#text[@]} -gt 0 ] || usage "give a folder of text"
cd "$(dirname "$0")/.."
OUT=outputs/real_text
[ ${#chat[@]} -eq 0 ] || more+=(--chat "${chat[@]}")
[ ${#pairs[@]} -eq 0 ] || more+=(--pairs "${pairs[@]}")
if [ ! -e $OUT/recipe.yaml ]; then
    python runs/new.py ./$OUT --gpu cpu --hours "${HOURS:-0.5}" --text "${text[@]}" "${more[@]}"
fi
exec bash runs/recipe.sh $OUT
