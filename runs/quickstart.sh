#!/usr/bin/env bash
# From nothing to a chatting model in minutes, on two CPU cores, with no network: `make quickstart`.
# Every stage is the script and the launch line of a real run; only the YAML is small.
# `make quickstart MODEL=quickstart-mla-moe` sends another shape of model/configs through the same chain and numbers.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-quickstart}
OUT=outputs/$MODEL
[ -e "model/configs/$MODEL.json" ] || { echo "error: no model/configs/$MODEL.json: give another MODEL" >&2; exit 2; }
# One thread a core, up to four: a model this small gains nothing from more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) < 4 ? $(nproc) : 4))} TOKENIZERS_PARALLELISM=false
[ ! -e "$OUT/summary.json" ] || rm -rf "$OUT" # a finished run is made anew, an interrupted one goes on
. runs/stages.sh

config() { # config FOLDER: the path of FOLDER/configs/quickstart.yaml, rewritten for this model and its own outputs
    sed "s#outputs/quickstart\b#$OUT#g; s#model/configs/quickstart\b#model/configs/$MODEL#" "$1/configs/quickstart.yaml" > "$OUT/$1.yaml"
    echo "$OUT/$1.yaml"
}

stage sample    python data/sample/make_sample.py --output "$OUT/sample"
stage tokenizer python tokenizer/train_tokenizer.py --config "$(config tokenizer)"
stage shards    python data/prepare_pretrain.py --config "$(config data)"
stage pretrain  recipe pretrain/pretrain.py --config "$(config pretrain)"
stage sft       recipe sft/sft.py --config "$(config sft)"
stage dpo       recipe rlhf/dpo.py --config "$(config rlhf)"
stage exam      python eval/run_eval.py --config "$(config eval)"
stage exam_report python eval/report.py --results "$OUT/eval" --output "$OUT/eval/report.md"
rm -rf "$OUT/native" # of an interrupted run
stage export    python export/to_native.py --checkpoint "$OUT/dpo" --output "$OUT/native"
stage chat      python runs/ask.py --model "$OUT/native" --output "$OUT/chat.json" \
    --questions "广东的省会叫什么？" "Which city is the capital of France?" "你叫什么名字？"
python runs/summarize.py --run "$OUT"
