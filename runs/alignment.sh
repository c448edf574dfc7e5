#!/usr/bin/env bash
# Compare the methods after pretraining on two CPU cores, from one chat model, in about half an hour, without network:
#     make quickstart    # first: the base model, the sample and a teacher come from outputs/quickstart
#     make alignment
# The quickstart's SFT knows nearly all answers, so all methods start here from a short one. docs/alignment.md shows the
# tables and says which method fits which data. Stop and repeat it at any time; to start over, delete outputs/alignment.
set -euo pipefail
cd "$(dirname "$0")/.."
FROM=${FROM:-outputs/quickstart} OUT=${OUT:-outputs/alignment}
for path in "$FROM/pretrain/config.json" "$FROM/sft/config.json" "$FROM/sample/qa_test.jsonl"; do
    if [ ! -e "$path" ]; then
        echo "error: there is no $path: run make quickstart first, or set FROM to another finished run" >&2
        exit 2
    fi
done
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))} TOKENIZERS_PARALLELISM=false
. runs/stages.sh

# tune NAME SCRIPT CONFIG OPTIONS...: train the model of the short SFT with a config of the quickstart -> $OUT/NAME
methods=() checkpoints=() steps=${STEPS:-60}
tune() {
    local name=$1 script=$2 config=$3
    shift 3
    methods+=("$name") checkpoints+=("$name=$OUT/$name")
    sed -e "s#outputs/quickstart\b#$FROM#g" "$config" > "$OUT/$name.yaml"
    stage "$name" recipe "$script" --config "$OUT/$name.yaml" --model_name_or_path "$OUT/sft" \
        --output_dir "$OUT/$name" --eval_strategy no --save_steps 50 "$@"
}

# measure FOLDER DATA TASKS...: measure the models that were tuned since the last call -> $OUT/FOLDER
measure() {
    local folder=$1 data=$2
    shift 2
    stage "$folder" python eval/run_eval.py --checkpoints "${checkpoints[@]}" --chat "${methods[@]}" --tasks "$@" \
        --sample_dir "$data" --output "$OUT/$folder" --batch_size 32 --device cpu
    stage "$folder-report" python eval/report.py --results "$OUT/$folder" --output "$OUT/$folder/report.md"
    methods=() checkpoints=()
}

# The start: 60 steps of SFT.
tune sft sft/sft.py sft/configs/quickstart.yaml --model_name_or_path "$FROM/pretrain" --max_steps 60

# More of the same instructions: all parameters, LoRA.
tune sft_more sft/sft.py sft/configs/quickstart.yaml --max_steps "$steps" --warmup_steps 10
tune lora sft/sft.py sft/configs/quickstart-lora.yaml --max_steps "$steps"

# Pairs of a better and a worse answer. At 5e-5, DPO costs right answers.
tune dpo rlhf/dpo.py rlhf/configs/quickstart.yaml --max_steps "$steps" --learning_rate 1e-5
tune orpo rlhf/orpo.py rlhf/configs/quickstart-orpo.yaml --max_steps "$steps" --learning_rate 5e-5
tune simpo rlhf/simpo.py rlhf/configs/quickstart-simpo.yaml --max_steps "$steps" --learning_rate 2e-5

# Answers that are labeled good or bad: those of the pairs, one by one.
for part in train eval; do
    stage "kto_$part" python data/convert_chat.py --kind kto --input "$FROM/sample/preference_$part.jsonl" \
        --output "$OUT/kto_$part.jsonl"
done
tune kto rlhf/kto.py rlhf/configs/quickstart-kto.yaml --max_steps "$steps" --learning_rate 1e-5 \
    --train_files "$OUT/kto_train.jsonl" --eval_files "$OUT/kto_eval.jsonl"

# Questions with an answer that can be verified.
tune grpo rlhf/grpo.py rlhf/configs/quickstart-grpo.yaml

# The probabilities of a teacher: the finished SFT of the quickstart.
stage teacher python tools/store_teacher.py --teacher "$FROM/sft" --train_files "$FROM/sample/sft_train.jsonl" \
    --max_length 128 --batch_size 64 --output "$OUT/teacher"
tune distill sft/distill.py sft/configs/quickstart-distill.yaml --teacher_targets "$OUT/teacher" --max_steps "$steps" \
    --warmup_steps 10

measure eval "$FROM/sample" sample_qa sample_pairs

# Tool calls, which no method learns from other data: SFT on chats with calls, from the finished SFT, in two runs. Then
# rewards for exactly the right calls; they teach nothing after the first run, which makes too few of them.
stage tool_sample python data/sample/make_tool_sample.py --sample "$FROM/sample" --output "$OUT/tool_sample"
tune tools sft/sft.py sft/configs/quickstart-tools.yaml --model_name_or_path "$FROM/sft" \
    --train_files "$OUT/tool_sample/sft_train.jsonl" --eval_files "$OUT/tool_sample/sft_eval.jsonl"
tune tools_more sft/sft.py sft/configs/quickstart-tools.yaml --model_name_or_path "$OUT/tools" --max_steps 500 --seed 1 \
    --train_files "$OUT/tool_sample/sft_train.jsonl" --eval_files "$OUT/tool_sample/sft_eval.jsonl"
tune tools_grpo rlhf/grpo.py rlhf/configs/quickstart-tools-grpo.yaml --model_name_or_path "$OUT/tools_more" \
    --train_files "$OUT/tool_sample/calls_train.jsonl"
measure eval-calls "$OUT/tool_sample" sample_calls

python runs/compare.py --run "$OUT" # writes $OUT/table.md
