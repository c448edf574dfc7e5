#!/usr/bin/env bash
# Run the whole chain on real text, instructions and benchmarks, on two CPU cores in 20 to 30 minutes:
#     bash runs/real_text.sh DATA_DIR
# DATA_DIR holds pretrain/ (text), sft/ (instructions), preference/ (preference pairs) and eval/{cmmlu,ceval}/ (CSV
# files). runs/quickstart.sh explains the stages.
set -euo pipefail
if [ $# -ne 1 ] || [ ! -d "$1/pretrain" ]; then
    echo "error: usage: bash runs/real_text.sh DATA_DIR (DATA_DIR/pretrain holds text)" >&2
    exit 2
fi
DATA=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
OUT=outputs/real_text
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} TOKENIZERS_PARALLELISM=false
. runs/stages.sh

# Tokenizer and token shards. data/configs/real-text.yaml reads the text through the link $OUT/data.
stage tokenizer python tokenizer/train_tokenizer.py --config tokenizer/configs/real-text.yaml \
    --files "$DATA"/pretrain/zh_*.jsonl.gz "$DATA"/pretrain/en_*.jsonl.gz
ln -sfn "$DATA" $OUT/data
stage shards python data/prepare_pretrain.py --config data/configs/real-text.yaml

# Instructions and preference pairs in their standard form, with a part held out for evaluation.
stage sft_rows python data/convert_chat.py --kind sft --on_bad_row skip --eval_fraction 0.02 \
    --input "$DATA"/sft/{alpaca_zh_demo,alpaca_en_demo,identity,belle_2m_cn_sample,belle_3.5m_cn_sample}.json \
    "$DATA"/sft/{firefly_1.1m_sample,v1_sft_demo}.jsonl "$DATA"/sft/alpaca_chinese_part00.jsonl.gz \
    --output $OUT/sft_train.jsonl --eval_output $OUT/sft_eval.jsonl
stage preferences python data/convert_chat.py --kind preference --on_bad_row skip --eval_fraction 0.1 \
    --input "$DATA"/preference/{dpo_zh_demo.json,v1_dpo_demo.jsonl,infinity_preference_train.parquet} \
    --output $OUT/preference_train.jsonl --eval_output $OUT/preference_eval.jsonl

# Training: pretraining, supervised fine-tuning, preference optimization.
stage pretrain recipe pretrain/pretrain.py --config pretrain/configs/real-text.yaml
stage sft recipe sft/sft.py --config sft/configs/real-text.yaml
stage dpo recipe rlhf/dpo.py --config rlhf/configs/real-text.yaml

# Evaluation on local copies of CMMLU and C-Eval, and export to a stock architecture.
stage tasks python eval/local_exams.py --cmmlu "$DATA/eval/cmmlu" --ceval "$DATA/eval/ceval" --output $OUT/tasks
stage exam python eval/run_eval.py --config eval/configs/real-text.yaml
stage report python eval/report.py --results $OUT/eval --output $OUT/report.md
stage export python export/to_native.py --checkpoint $OUT/dpo --output $OUT/native
