"""Small files under the names, and with the columns, of the data sets that the recipes read from the Hub."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

INDUSTRIES = [
    *("accommodation_catering_hotel", "artificial_intelligence_machine_learning", "computer_communication"),
    *("computer_programming_code", "current_affairs_government_administration", "film_entertainment"),
    *("literature_emotion", "mathematics_statistics", "news_media", "tourism_geography"),
]
WORDS = {
    "zh": "山水之间有一座小城，春天的花开在河边，老人和孩子一起散步；傍晚的灯光照亮了街道，人们谈论着今年的收成。",
    "en": "a small town lies between hills and water, children walk by the river while people talk of the harvest ",
    "code": "".join(
        f"def add_{name}(first, second):\n    total = first + second\n    return total  # of {name}\n\n\n"
        for name in ("apples", "pears", "plums", "houses", "rivers", "letters", "numbers")
    ),
}


def text(language: str, number: int) -> str:
    """Return a text that no other number has."""
    words = WORDS[language]
    turned = words[number % len(words) :] + words[: number % len(words)]
    return (
        f"{number} {words}\n{turned} {number * 7919}\n{words[::-1]}" if language != "code" else f"# {number}\n{words}"
    )


def texts(language: str, start: int, count: int = 8) -> list[str]:
    return [text(language, start + number) for number in range(count)]


def questions(count: int = 6) -> list[tuple[str, str]]:
    return [(f"{number} 加 {number} 等于几？", f"等于 {2 * number}。") for number in range(1, count + 1)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as .parquet, as a .json array, or as .jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_pretraining_sets(hub: Path) -> None:
    fineweb = hub / "openbmb/Ultra-FineWeb/data"
    for language, name in (("zh", "zh-part-001-of-256"), ("en", "en-part-0001-of-2048")):
        rows = [{"content": each, "score": "0.9", "source": "web"} for each in texts(language, 100)]
        write(fineweb / f"ultrafineweb_{language}/ultrafineweb-{name}.parquet", rows)
    named = {
        "YeungNLP/firefly-pretrain-dataset/web.jsonl": texts("zh", 200),
        "jingyaogong/minimind_dataset/pretrain_t2t_mini.jsonl": texts("zh", 300, 20),
        "Skywork/SkyPile-150B/data/2020-40_zh_head_0000.jsonl": texts("zh", 400),
    }
    for name, content in named.items():
        write(hub / name, [{"text": each} for each in content])
    edu = [{"text": each, "score": 0.8} for each in texts("zh", 500)]
    write(hub / "opencsg/chinese-fineweb-edu-v2/data/00000.parquet", edu)
    wiki = [{"completion": each, "source": "wikipedia.zh2307"} for each in texts("zh", 600)]
    write(hub / "pleisto/wikipedia-cn-20230720-filtered/wikipedia-cn-20230720-filtered.json", wiki)
    baike = [
        {"title": "条目", "summary": each, "sections": [{"title": "历史", "content": text("zh", 777)}]}
        for each in texts("zh", 700)
    ]
    write(hub / "xuqinyang/BaiduBaike-5.63M/563w_baidubaike.json", baike)
    zhihu = [
        {"INSTRUCTION": "为何？", "RESPONSE": each, "SOURCE": "Zhihu", "METADATA": '{"upvotes": "赞同 150"}'}
        for each in texts("zh", 800)
    ]
    write(hub / "wangrui6/Zhihu-KOL/data/train-00000-of-00005-a1.parquet", zhihu)
    for number, language in enumerate(("cpp", "java", "python")):
        code = [
            {
                "max_stars_repo_path": "a",
                "max_stars_repo_name": "o/r",
                "max_stars_count": 3,
                "id": "0",
                "content": each,
            }
            for each in texts("code", 900 + 10 * number)
        ]
        write(hub / f"bigcode/starcoderdata/{language}/train-00000-of-00001.parquet", code)
    for number, industry in enumerate(INDUSTRIES):
        for language, name in (("zh", "chinese"), ("en", "english")):
            rows = [
                {"text": each, "alnum_ratio": 0.9, "quality_score": 4.5, "_id": 1, "industry_type": "行业"}
                for each in texts(language, 1000 + 10 * number, 3)
            ]
            write(hub / f"BAAI/IndustryCorpus2/{industry}/{name}/high/rank_00000.parquet", rows)


def write_chat_sets(hub: Path) -> None:
    asked = questions()
    prompt_response = [{"id": "1", "prompt": question, "response": reply} for question, reply in asked]
    write(hub / "Mxode/Chinese-Instruct/stem_zh/stem_zh.jsonl", prompt_response)
    write(hub / "Mxode/Chinese-Instruct-Lite/general/general.jsonl", prompt_response)
    alpaca = [{"instruction": question, "input": "", "output": reply} for question, reply in asked]
    write(hub / "BelleGroup/train_2M_CN/train_2M_CN.json", alpaca)
    write(hub / "tatsu-lab/alpaca/data/train-00000-of-00001-a0.parquet", [each | {"text": "t"} for each in alpaca])
    turns = [{"human": question, "assistant": reply} for question, reply in asked]
    dialogues = [{"conversation_id": "1", "category": "c", "conversation": turns[:2]} for _ in asked]
    write(hub / "YeungNLP/moss-003-sft-data/moss-003-sft-data.jsonl", dialogues)
    for language in ("zh", "en"):
        write(hub / f"shareAI/ShareGPT-Chinese-English-90k/sharegpt_jsonl/common_{language}_70k.jsonl", dialogues)
    firefly = [{"kind": "NLI", "input": question, "target": reply} for question, reply in asked]
    write(hub / "YeungNLP/firefly-train-1.1M/firefly-train-1.1M.jsonl", firefly)
    messages = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": reply}] for question, reply in asked
    ]
    write(hub / "jingyaogong/minimind_dataset/sft_t2t_mini.jsonl", [{"conversations": each} for each in messages])
    write(hub / "opencsg/smoltalk-chinese/data/math.parquet", [{"messages": each} for each in messages])
    write(hub / "m-a-p/Code-Feedback/Code-Feedback.jsonl", [{"id": 1, "messages": each} for each in messages])
    said = [[{"from": "human", "value": question}, {"from": "gpt", "value": reply}] * 2 for question, reply in asked]
    belle = [{"id": "1", "conversations": each[:2]} for each in said]
    write(hub / "BelleGroup/train_3.5M_CN/train_3.5M_CN.json", belle)
    infinity = [{"id": 1, "conversations": each, "label": None, "langdetect": "zh", "source": "s"} for each in said]
    for name in ("7M/train-00000-of-00075", "Gen/train-00000-of-00015"):
        write(hub / f"BAAI/Infinity-Instruct/{name}.parquet", infinity)
    deepctrl = [alpaca_row | {"history": [["你好", "你好！"]], "id": 1} for alpaca_row in alpaca]
    write(hub.parent / "deepctrl/sft_data_zh.jsonl", deepctrl)  # on ModelScope


def write_preference_sets(hub: Path) -> None:
    asked = questions(8)
    both = [(question, reply, f"不知道 {number}。") for number, (question, reply) in enumerate(asked)]
    strings = [{"prompt": question, "chosen": good, "rejected": bad} for question, good, bad in both]
    write(hub / "Skepsun/huozi_rlhf_data_json/huozi_rlhf_data.json", strings)
    as_messages = [
        {
            "prompt": question,
            "chosen": [{"role": "user", "content": question}, {"role": "assistant", "content": good}],
            "rejected": [{"role": "user", "content": question}, {"role": "assistant", "content": bad}],
        }
        for question, good, bad in both
    ]
    write(hub / "FuseAI/FuseChat-3.0-DPO-Data/data/train-00000-of-00001.parquet", as_messages)
    pairs = [{"chosen": each["chosen"], "rejected": each["rejected"]} for each in as_messages]
    write(hub / "jingyaogong/minimind_dataset/dpo.jsonl", pairs)
    infinity = [each | {"task_category": "math", "id": "1"} for each in as_messages]
    for split in ("train", "test"):
        write(hub / f"BAAI/Infinity-Preference/data/{split}-00000-of-00001.parquet", infinity)
    llamafactory = [
        {
            "conversations": [{"from": "human", "value": question}],
            "chosen": {"from": "gpt", "value": good},
            "rejected": {"from": "gpt", "value": bad},
        }
        for question, good, bad in both
    ]
    for language in ("zh", "en"):
        write(hub / f"llamafactory/DPO-En-Zh-20k/dpo_{language}.json", llamafactory)
