"""The list of what cleaning removes: each change with its rule and place, and the text around it."""

import gzip
import json

import pytest
from conftest import run

from buddygpt.cli.errors import UserError

ADVERT, LEAD = "觉得有用记得点个“在看”。", "今天的雨水比往年多，村里的人都在屋里喝茶。"


@pytest.mark.slow
def test_removals_are_listed_with_rule_and_place(tmp_path, capsys):
    file = tmp_path / "pages.jsonl.gz"
    texts = [
        f"{LEAD}\n{ADVERT}\n收成也好。",
        f"{LEAD}详情见 https://a.cn/b 的说明。",
        "Это только русский текст, и больше ничего.",
    ]
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"content": text}, ensure_ascii=False) + "\n" for text in texts)
    run("tools/benchmarks/cleaning.py", "--files", file, "--profiles", "zh-web", "--removals", "all")
    printed = capsys.readouterr().out
    assert f"{file}:1: …{LEAD} [-{ADVERT}" in printed and f"{file}:2: …{LEAD}详情见 [-https://a.cn/b-]" in printed
    assert f"{file}:3: other [-{texts[2]}-]" in printed
    assert "zh-web remove_sentences: 1 different removals, 1 shown" in printed
    with pytest.raises(UserError, match="`remove_ips` removes nothing; these rules do: zh-web "):
        run("tools/benchmarks/cleaning.py", "--files", file, "--profiles", "zh-web", "--removals", "remove_ips")
