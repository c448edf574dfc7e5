#!/usr/bin/env bash
# Train a small chat model from scratch on two CPU cores in about seven minutes, without network access:
#     make quickstart
# Train another model of model/configs on the same data, with the same settings:
#     make quickstart MODEL=quickstart-mla-moe
#
# Read this file to learn the chain: each stage below is one script with one small YAML config. A stage reads what
# earlier stages wrote to outputs/quickstart. Real runs use the same scripts with larger configs.
set -euo pipefail       # stop at the first error
cd "$(dirname "$0")/.." # all paths are relative to the repository

MODEL=${MODEL:-quickstart}
OUT=outputs/$MODEL
if [ ! -e "model/configs/$MODEL.json" ]; then
    echo "error: no model/configs/$MODEL.json: give another MODEL" >&2
    exit 2
fi

# summary.json is written last. If it exists, the run is complete: keep it under another name and start over.
# Otherwise resume: stages that are complete are skipped.
if [ -e "$OUT/summary.json" ]; then
    finished=$OUT-$(date +%Y%m%d-%H%M%S)
    mv "$OUT" "$finished"
    echo "moved the finished run to $finished"
fi

# One thread per core, at most four: more would not speed up a model this small.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))} TOKENIZERS_PARALLELISM=false

# Defines `stage NAME COMMAND`, which runs and times a command, and `recipe SCRIPT`, which runs `accelerate launch`.
. runs/stages.sh

echo "Training a model of about a million parameters, from text to chat, without network: about seven minutes on two cores."
echo "Ctrl-C stops it; the same command continues. Everything is written to $OUT."

# config FOLDER: copy FOLDER/configs/quickstart.yaml to $OUT with the paths of this model, and print the copy's path.
config() {
    sed -e "s#outputs/quickstart\b#$OUT#g" -e "s#model/configs/quickstart\b#model/configs/$MODEL#" \
        "$1/configs/quickstart.yaml" > "$OUT/$1.yaml"
    echo "$OUT/$1.yaml"
}

# 1. Generate text, instructions, preference pairs and test questions from tables of facts -> $OUT/sample
stage sample python data/sample/make_sample.py --output "$OUT/sample"

# 2. Train a tokenizer on the text -> $OUT/tokenizer
stage tokenizer python tokenizer/train_tokenizer.py --config "$(config tokenizer)"

# 3. Tokenize the text into binary shards, and hold out 2% for evaluation -> $OUT/shards
stage shards python data/prepare_pretrain.py --config "$(config data)"

# 4. Train a randomly initialized model to predict the next token of the shards -> $OUT/pretrain
stage pretrain recipe pretrain/pretrain.py --config "$(config pretrain)"

# 5. Supervised fine-tuning: teach it to answer, on the instructions -> $OUT/sft
stage sft recipe sft/sft.py --config "$(config sft)"

# 6. Direct preference optimization: teach it to prefer good answers, on the preference pairs -> $OUT/dpo
stage dpo recipe rlhf/dpo.py --config "$(config rlhf)"

# 7. Measure the three checkpoints with lm-eval, and write a report -> $OUT/eval
stage exam python eval/run_eval.py --config "$(config eval)"
stage exam_report python eval/report.py --results "$OUT/eval" --output "$OUT/eval/report.md"

# 8. Convert the last checkpoint to a stock architecture of transformers, which needs no custom code -> $OUT/native
stage export python export/to_native.py --checkpoint "$OUT/dpo" --output "$OUT/native"

# 9. Serve it with `transformers serve` and ask three questions -> $OUT/chat.json
stage chat python runs/ask.py --model "$OUT/native" --output "$OUT/chat.json" \
    --questions "广东的省会叫什么？" "Which city is the capital of France?" "你叫什么名字？"

# Collect all results -> $OUT/report.md and $OUT/summary.json
python runs/summarize.py --run "$OUT"

echo "Next: read $OUT/report.md, or open $OUT/eval/report.html"
echo "      make chat MODEL=$OUT/dpo      talk to the model in the browser"
echo "      bash runs/real_text.sh TEXT   train on a folder of your own text"
