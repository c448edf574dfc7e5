#!/usr/bin/env bash
# Teach the model of a finished quickstart to call a calculator and a table, with and without thoughts, and count the
# exact calls. It takes about eight minutes of CPU time, without network:
#     make quickstart
#     bash runs/tools.sh
# docs/tools.md shows the result. Stop and repeat it at any time; to start over, delete outputs/tools.
set -euo pipefail
cd "$(dirname "$0")/.."
FROM=${FROM:-outputs/quickstart} OUT=${OUT:-outputs/tools}
for path in "$FROM/sft/config.json" "$FROM/sample/qa_test.jsonl"; do
    if [ ! -e "$path" ]; then
        echo "error: there is no $path: run make quickstart first, or set FROM to another finished run" >&2
        exit 2
    fi
done
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))} TOKENIZERS_PARALLELISM=false
. runs/stages.sh

# 1. Chats that need one call, two or none, and held-out questions -> $OUT/tool_sample
stage tool_sample python data/sample/make_tool_sample.py --sample "$FROM/sample" --output "$OUT/tool_sample"

# 2. Supervised fine-tuning on calls, thoughts and answers: 700 steps, then 500 more at a fresh learning rate
rows=(--train_files "$OUT/tool_sample/sft_train.jsonl" --eval_files "$OUT/tool_sample/sft_eval.jsonl")
stage tools recipe sft/sft.py --config sft/configs/quickstart-tools.yaml "${rows[@]}" \
    --model_name_or_path "$FROM/sft" --output_dir "$OUT/tools"
stage tools_more recipe sft/sft.py --config sft/configs/quickstart-tools.yaml "${rows[@]}" \
    --model_name_or_path "$OUT/tools" --output_dir "$OUT/tools_more" --max_steps 500 --seed 1

# 3. Exact matches of the calls, by kind of question -> $OUT/report.md
stage exam python eval/run_eval.py --config eval/configs/quickstart-tools.yaml \
    --checkpoints "sft=$FROM/sft" "tools=$OUT/tools" "tools_more=$OUT/tools_more" --chat sft tools tools_more \
    --sample_dir "$OUT/tool_sample" --output "$OUT/eval"
stage exam_report python eval/report.py --results "$OUT/eval" --output "$OUT/report.md"
echo "$OUT/report.md"
