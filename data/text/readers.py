"""Public sets of pretraining text by name: where they are, and how one of their rows becomes a document.

A new data set is one line in `READERS`; data/README.md lists them with size and licence.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Text = tuple[str, dict[str, Any]]  # of a document, and its metadata
STARCODER_HEADER = re.compile(r"(?:(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?)?")
STARCODER_COLUMNS = {"repo": "max_stars_repo_name", "path": "max_stars_repo_path"}
UPVOTES = re.compile(r"(\d[\d,]*(?:\.\d+)?)\s*([千万kKwW]?)")
THOUSANDS = {"": 1, "千": 1_000, "k": 1_000, "万": 10_000, "w": 10_000}


def paragraphs(*parts: str | None) -> str:
    """Join the parts that are not empty, a blank line between them."""
    return "\n\n".join(part.strip() for part in parts if part and part.strip())


def wikipedia(row: dict[str, Any]) -> Text:
    """The title stands above the article: the text does not repeat it."""
    return paragraphs(row["title"], row["text"]), {}


def baidubaike(row: dict[str, Any]) -> Text:
    sections = [part for section in row.get("sections") or () for part in (section["title"], section["content"])]
    return paragraphs(row["title"], row.get("summary"), *sections), {}


def baike_qa(row: dict[str, Any]) -> Text:
    """`desc` explains the question; often it is empty, or the title again."""
    desc = row.get("desc")
    return paragraphs(row["title"], None if desc == row["title"] else desc, row["answer"]), {}


def zhihu_kol(row: dict[str, Any]) -> Text:
    metadata = row["METADATA"] if isinstance(row["METADATA"], dict) else json.loads(row["METADATA"])
    return paragraphs(row["INSTRUCTION"], row["RESPONSE"]), {"upvotes": parse_upvotes(metadata["upvotes"])}


def parse_upvotes(label: str) -> int:
    """Read the label of Zhihu's button: `赞同 15`, `赞同 1.2 万`; `赞同` alone is 0."""
    found = UPVOTES.search(label)
    return round(float(found[1].replace(",", "")) * THOUSANDS[found[2].lower()]) if found else 0


def wanjuan(row: dict[str, Any]) -> Text:
    """Most parts have `content`; exams a question, options, an answer and its explanation."""
    if "q_main" not in row:
        return row["content"], {}
    options = [f"{letter.upper()}. {row[key]}" for letter in "abcde" if row.get(key := f"option_{letter}")]
    answer, detail = row.get("std_ans") or row.get("answer"), row.get("answer_detail")
    question = "\n".join([row["q_main"].strip(), *options])
    return paragraphs(question, answer and f"答案：{answer}", detail and f"解析：{detail}"), {}


def starcoderdata(row: dict[str, Any]) -> Text:
    """A part of the files opens with a line of StarCoder's own tokens (`<reponame>...`), which is taken off."""
    header = STARCODER_HEADER.match(row["content"])
    metadata = {"stars": row.get("max_stars_count") or 0}  # null where no star was seen
    metadata |= {key: row[column] for key, column in STARCODER_COLUMNS.items() if row.get(column)}
    return row["content"][header.end() :], metadata


def chinese_instruct(row: dict[str, Any]) -> Text:
    return paragraphs(row["prompt"], row["response"]), {}


def belle(row: dict[str, Any]) -> Text:
    return paragraphs(row["instruction"], row.get("input"), row["output"]), {}


@dataclass(frozen=True)
class Reader:
    """How a data set's rows become documents: by their columns, or by a function."""

    name: str
    hub: str = ""  # OWNER/NAME of its data set on the Hugging Face Hub, where it has one
    files: dict[str, str] = field(default_factory=dict)  # language: glob of its files there
    text_key: tuple[str, ...] = ()  # the first of these columns that a row has is its text
    keep: tuple[str, ...] = ()  # columns of numbers that become metadata
    read: Callable[[dict[str, Any]], Text] | None = None  # instead of both
    minimums: dict[str, str] = field(default_factory=dict)  # option of the YAML: metadata that it bounds


INDUSTRY_NUMBERS = (
    *("quality_score", "perplexity", "alnum_ratio", "special_char_ratio", "char_rep_ratio", "word_rep_ratio"),
    *("flagged_words_ratio", "avg_line_length", "max_line_length", "num_words"),
)
COLUMNS = Reader("columns")  # any file: text_key and min_COLUMN come from the YAML
READERS = {
    reader.name: reader
    for reader in (
        COLUMNS,
        Reader(
            "ultra-fineweb",
            "openbmb/Ultra-FineWeb",
            {"zh": "data/ultrafineweb_zh/*.parquet", "en": "data/ultrafineweb_en/*.parquet"},
            text_key=("content",),
            keep=("score",),
            minimums={"min_score": "score"},
        ),
        Reader("firefly-pretrain", "YeungNLP/firefly-pretrain-dataset", {"zh": "*.jsonl"}, text_key=("text",)),
        Reader(
            "chinese-fineweb-edu-v2",
            "opencsg/chinese-fineweb-edu-v2",
            {"zh": "**/*.parquet"},
            text_key=("text",),
            keep=("score",),
            minimums={"min_score": "score"},
        ),
        Reader(
            "wikipedia",
            "wikimedia/wikipedia",
            {"zh": "20231101.zh/*.parquet", "en": "20231101.en/*.parquet"},
            read=wikipedia,
        ),
        Reader(
            "wikipedia-cn-filtered",
            "pleisto/wikipedia-cn-20230720-filtered",
            {"zh": "wikipedia-cn-20230720-filtered.json"},
            text_key=("completion",),
        ),
        Reader("baidubaike", "xuqinyang/BaiduBaike-5.63M", {"zh": "563w_baidubaike.json"}, read=baidubaike),
        Reader("baike-qa", files={"zh": ""}, read=baike_qa),
        Reader(
            "zhihu-kol",
            "wangrui6/Zhihu-KOL",
            {"zh": "data/*.parquet"},
            read=zhihu_kol,
            minimums={"min_upvotes": "upvotes"},
        ),
        Reader("skypile", "Skywork/SkyPile-150B", {"zh": "data/*.jsonl"}, text_key=("text",)),
        Reader("seq-monkey", files={"zh": ""}, text_key=("text",)),
        Reader("wanjuan", files={"zh": ""}, read=wanjuan),
        Reader(
            "starcoderdata",
            "bigcode/starcoderdata",
            {"code": "*/*.parquet"},
            read=starcoderdata,
            minimums={"min_stars": "stars"},
        ),
        Reader(
            "industrycorpus2",
            "BAAI/IndustryCorpus2",
            {"zh": "*/chinese/high/*.parquet", "en": "*/english/high/*.parquet"},
            text_key=("text",),
            keep=INDUSTRY_NUMBERS,
            minimums={"min_quality": "quality_score"},
        ),
        Reader("chinese-instruct", "Mxode/Chinese-Instruct", {"zh": "**/*.jsonl"}, read=chinese_instruct),
        Reader("belle", "BelleGroup/train_2M_CN", {"zh": "*.json"}, read=belle),
        Reader("minimind", "jingyaogong/minimind_dataset", {"zh": "pretrain_t2t.jsonl"}, text_key=("text",)),
    )
}
HUB_NAMES = {reader.hub: reader.name for reader in READERS.values() if reader.hub}
