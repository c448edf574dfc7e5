#!/usr/bin/env bash
# From nothing to a chatting model in minutes, on two CPU cores, with no network: `make quickstart`.
# Every stage is the script and the launch line of a real run; only the YAML is small.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=outputs/quickstart
# One thread a core, up to four: a model this small gains nothing from more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) < 4 ? $(nproc) : 4))} TOKENIZERS_PARALLELISM=false
[ ! -e $OUT/summary.json ] || rm -rf $OUT # a finished run is made anew, an interrupted one goes on
. runs/stages.sh

stage sample    python data/sample/make_sample.py --output $OUT/sample
stage tokenizer python tokenizer/train_tokenizer.py --config tokenizer/configs/quickstart.yaml
stage shards    python data/prepare_pretrain.py --config data/configs/quickstart.yaml
stage pretrain  recipe pretrain/pretrain.py --config pretrain/configs/quickstart.yaml
stage sft       recipe sft/sft.py --config sft/configs/quickstart.yaml
stage dpo       recipe rlhf/dpo.py --config rlhf/configs/quickstart.yaml
stage exam      python eval/run_eval.py --config eval/configs/quickstart.yaml
stage exam_report python eval/report.py --results $OUT/eval --output $OUT/eval/report.md
rm -rf $OUT/native # of an interrupted run
stage export    python export/to_native.py --checkpoint $OUT/dpo --output $OUT/native
stage chat      python runs/ask.py --model $OUT/native --output $OUT/chat.json \
    --questions "广东的省会叫什么？" "Which city is the capital of France?" "你叫什么名字？"
python runs/summarize.py --run $OUT
