#!/usr/bin/env bash
# Run the whole chain on your own text, on two CPU cores in 20 to 30 minutes:
#     bash runs/real_text.sh TEXT                     # a folder of .txt, .md, .jsonl, .parquet, ..., also compressed
#     bash runs/real_text.sh TEXT --instructions FILE... --preferences FILE... --cmmlu DIR --ceval DIR
# Every option may be left out: chat rows then come from the bundled sample, and without exams only held-out text is
# scored. `--text_column NAME` names the column of the text if it is not `text`, `--eval_fraction 0.1` holds out more of a
# few documents. Files of instructions and preferences have any schema that data/convert_chat.py knows.
# runs/quickstart.sh explains the stages.
set -euo pipefail
usage() {
    echo "error: $1; usage: bash runs/real_text.sh TEXT [--text_column NAME] [--eval_fraction NUMBER]" \
        "[--instructions FILE...] [--preferences FILE...] [--cmmlu DIR] [--ceval DIR]" >&2
    exit 2
}
text=() instructions=() preferences=() exams=() column=text fraction=0.005 option=text
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
        text_column) column=$word ;;
        eval_fraction) fraction=$word ;;
        instructions) instructions+=("$path") ;;
        preferences) preferences+=("$path") ;;
        cmmlu | ceval) exams+=("--$option" "$path") ;;
    esac
done
[ ${#text[@]} -gt 0 ] || usage "give a folder of text"
cd "$(dirname "$0")/.."
OUT=outputs/real_text
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} TOKENIZERS_PARALLELISM=false
. runs/stages.sh

# What is not given: chat rows of the bundled sample, and no exam.
if [ ${#instructions[@]} -eq 0 ] || [ ${#preferences[@]} -eq 0 ]; then
    stage sample python data/sample/make_sample.py --output $OUT/sample
    [ ${#instructions[@]} -gt 0 ] || instructions=($OUT/sample/sft_train.jsonl)
    [ ${#preferences[@]} -gt 0 ] || preferences=($OUT/sample/preference_train.jsonl)
fi
tasks=(heldout_text) folders=() task_folder=null
for ((i = 0; i < ${#exams[@]}; i += 2)); do
    folders+=("${exams[i + 1]}")
    if [ "${exams[i]}" = --cmmlu ]; then tasks+=(cmmlu); else tasks+=(ceval-valid); fi
done

# Tokenizer and token shards. Documents that contain an item of the exams are left out.
stage tokenizer python tokenizer/train_tokenizer.py --config tokenizer/configs/real-text.yaml \
    --files "${text[@]}" --text_column "$column"
stage shards python data/prepare_pretrain.py --config data/configs/real-text.yaml \
    --sources "${text[@]}" --text_key "$column" --eval_fraction "$fraction" --decontaminate "${folders[@]:-null}"

# Instructions and preference pairs in their standard form, with a part held out for evaluation.
stage sft_rows python data/convert_chat.py --kind sft --on_bad_row skip --eval_fraction 0.02 \
    --input "${instructions[@]}" --output $OUT/sft_train.jsonl --eval_output $OUT/sft_eval.jsonl
stage preferences python data/convert_chat.py --kind preference --on_bad_row skip --eval_fraction 0.1 \
    --input "${preferences[@]}" --output $OUT/preference_train.jsonl --eval_output $OUT/preference_eval.jsonl

# Training: pretraining, supervised fine-tuning, preference optimization.
stage pretrain recipe pretrain/pretrain.py --config pretrain/configs/real-text.yaml
stage sft recipe sft/sft.py --config sft/configs/real-text.yaml
stage dpo recipe rlhf/dpo.py --config rlhf/configs/real-text.yaml

# Evaluation on held-out text and the local copies of exams, and export to a stock architecture.
if [ ${#exams[@]} -gt 0 ]; then
    task_folder=$OUT/tasks
    stage tasks python eval/local_exams.py "${exams[@]}" --output $task_folder
fi
stage exam python eval/run_eval.py --config eval/configs/real-text.yaml \
    --tasks "${tasks[@]}" --include_path $task_folder
stage report python eval/report.py --results $OUT/eval --output $OUT/report.md
stage export python export/to_native.py --checkpoint $OUT/dpo --output $OUT/native
