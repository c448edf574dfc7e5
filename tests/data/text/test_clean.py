"""Tests of cleaning: operators change or drop what they should and leave look-alikes alone, and the report is true."""

import gzip
import json
import pickle
import random
import re
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import ftfy
import pytest
import yaml
from conftest import ROOT
from datatrove.data import Document
from PIL import Image

from buddygpt.cli.errors import UserError
from buddygpt.data.text.clean import PROFILES, Cleaner, Profile, load_profile
from buddygpt.data.text.mappers import FTFY, MAPPERS
from buddygpt.data.text.measures import MEASURES
from buddygpt.data.text.report import EXAMPLES, EXCERPT, ExampleWriter, write_report

DATA = ROOT.parent / "shared" / "data" / "pretrain"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")

PUNCTUATION = "「春天」，『花』。真的！吗？他说：《诗经》…… 一——二、“三”‘四’；（五）【六】￥７８ＡＢ～·"
PROSE = "春天来了，院子里的桃花开得正好，孩子们在树下跑来跑去。老人坐在门口晒太阳，一边喝茶，一边讲从前的故事。"
ARTICLE = (
    "这座小城建于宋代，城墙用青石砌成，至今还留着两座城门。城里的街道不宽，铺着石板，下过雨以后亮得像镜子。\n"
    "编辑这份地方志的人在书里写道：城中原有水井三十六口，居民关注的是水的冷暖，而不是它的来源。\n"
    "上个世纪的老照片里，桥头总有人卖茶。一碗茶只要两分钱，客人可以从早坐到晚，谈论收成、天气和远方的亲戚。\n"
    "后来修了铁路，年轻人去了省城，茶馆一间一间关了门，只有桥还在原来的地方。今年夏天的大水没过了第三级台阶，"
    "老人们说，和民国二十年的那一次差不多高，不过这一次，没有人离开。有的学生把这些故事录了下来，整理成一本小书，"
    "书的版权属于学校，定价十二元。买书的人并不多，可是每一个买了的人，都会去看看那座桥。"
)
POEM = "静夜思\n李白\n床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。"
CODE = (
    "def mean(values: list[float]) -> float:\n\t# tabs stay, e.g. in Makefiles\n    if not values:\n"
    '        raise ValueError("no values，没有数")\n    return sum(values)  /  len(values)\n\n\n'
    "class Counter:\n    def __init__(self) -> None:\n        self.total = 0\n\n    def add(self, n: int) -> int:\n"
    "        self.total += n\n        return self.total"
)


HAN = [chr(code) for code in range(0x4E00, 0x5600)]
SCRIPTS = {"min_han": 0.1, "max_accented": 0.01}


def clean(text: str, profile: str | Profile) -> tuple[str, str | None]:
    """Return the text that a profile leaves, and the rule that it breaks."""
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    document = Document(text, id="0", metadata={"source": "web"})
    verdict = Cleaner({"web": profile}).filter(document)
    return document.text, None if verdict is True else verdict[1]


def read(name: str, key: str = "text", rows: int | None = None) -> list[str]:
    with gzip.open(DATA / name, "rb") as file:
        return [json.loads(line)[key] for _, line in zip(range(rows or 10**9), file, strict=False)]


def write_profile(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "operator, parameters, before, after",
    [
        ("normalize_lines", {}, " a\r\nb\rc\x00\x07\n \n\n\n\n\u3000\nd\n", "a\nb\nc\n\n\nd"),
        ("fix_unicode", {"unescape_html": False}, "春\r\n天\r\r\né", "春\n天\n\né"),
        ("fix_unicode", {"unescape_html": True}, "春&#13;\n天&#13;&#10;é", "春\n天\né"),
        ("fix_unicode", {"unescape_html": False}, "schÃ¶n ﬁne\u2028a&lt;b", "schön fine\na&lt;b"),
        ("fix_unicode", {"unescape_html": True}, "1 &lt; 2 &amp;&nbsp;3 &#20013;", "1 < 2 &\xa03 中"),
        ("normalize_spaces", {"collapse": True}, "  a \t b\xa0c  \nd\u200b\u3000\n\ne", "  a b c\nd\n\ne"),
        ("normalize_spaces", {"collapse": False}, "\tx  =  1 \u2003# 张\u3000三\u3000", "\tx  =  1  # 张\u3000三"),
        ("convert_chinese", {"config": "t2s"}, "「漢字」後來，皇后", "「汉字」后来，皇后"),
        ("remove_emails", {}, "来信a.b-c+d@mail.example.com.cn，或x@y.org。", "来信，或。"),
        ("remove_ips", {}, "服务器203.168.10.2:8080和11.120.33.4。", "服务器和。"),
        ("remove_ips", {}, "地址2001:0db8:85a3:0000:0000:8a2e:0370:7334。", "地址。"),
        ("remove_links", {}, "见https://a.cn/b?c=1&d=%E4，和www.x.com/y。", "见，和。"),
        ("remove_links", {}, "[文档](https://a.cn/b 'c')与![图](http://a.cn/d.png)。", "文档与。"),
        ("remove_phone_numbers", {}, "电话13812345678、+86 138-1234-5678或138 1234 5678。", "电话、或。"),
        ("remove_phone_numbers", {}, "(010)62345678，0571-87654321-802，0898—66638118，400-810-1234", "，，，"),
        ("remove_id_numbers", {}, "身份证11010519491231002X，男", "身份证，男"),
        ("remove_html", {}, "<p class='a'>一<br/>二<b>三</b></p><script>x()</script><!-- y -->", "\n一\n二三\n"),
        ("remove_html", {}, "一<script>if (a<b) x('</p>')</SCRIPT>二<!-- <p>y</p> -->三<style>", "一二三"),
        ("remove_html", {}, "<!DOCTYPE html><tr><td>name</td><td>age</td></tr>", "\nname age \n"),
        ("remove_html", {}, "<ul><li>一</li><LI>二</LI></ul>", "\n\n* 一\n* 二\n"),
        ("remove_spans", {"patterns": ["◆+", "a.c"]}, "◆◆一abc二", "一二"),
        ("remove_sentences", {"patterns": ["扫码"], "max_chars": 9}, "好。快扫码！\n扫码领\n好", "好。\n好"),
        ("remove_lines", {"patterns": ["编辑[:：]"], "max_chars": 9}, "编辑：张三\n他是编辑：对", "他是编辑：对"),
        (
            "remove_repeated_sentences",
            {"min_chars": 4},
            "今天很好。是。今天，很好！是。\n今天很好",
            "今天很好。是。是。",
        ),
        ("expand_latex_macros", {"max_chars": 9}, r"\newcommand{\R}{\mathbb R}$x\in\R$, \Re", r"$x\in\mathbb R$, \Re"),
        ("remove_sentences", {"patterns": ["扫码"], "max_chars": 9}, "今天很好 扫码领 是的。", "今天很好 是的。"),
        (
            "remove_repeated_sentences",
            {"min_chars": 4, "ends": "。！"},
            "今天很好。\nx = f(a)\n今天很好。\nx = f(a)",
            "今天很好。\nx = f(a)\nx = f(a)",
        ),
        ("remove_html", {}, "`<b>` 与 <b>粗</b>\n```\n<p>a</p>\n```\n<p>b", "`<b>` 与 粗\n```\n<p>a</p>\n```\n\nb"),
        (
            "remove_links",
            {},
            "`http://a.cn` 与 http://b.cn\n```\nhttp://c.cn\n```",
            "`http://a.cn` 与 \n```\nhttp://c.cn\n```",
        ),
        ("remove_copyright_header", {}, "#!/bin/sh\n# Copyright 2020 A\n# B\nls", "#!/bin/sh\nls"),
        ("remove_copyright_header", {}, "/* Licensed under\n * X */\nint a;", "\nint a;"),
    ],
)
def test_a_mapper_changes_what_it_is_for(operator, parameters, before, after):
    assert MAPPERS[operator](before, **parameters) == after
    assert MAPPERS[operator](after, **parameters) == after


@pytest.mark.parametrize(
    "operator, text",
    [
        ("remove_emails", "写成 name@example.com，或 `git@github.com`"),
        ("remove_html", "HTML标签成对出现，比如 <html> 和 </html>"),
        ("remove_ips", "路由器 192.168.1.1，本机 127.0.0.1，内网 10.100.20.3 与 172.16.100.1"),
        ("remove_emails", "@property 与 a@b，微博@张三，价格3@5"),
        ("remove_ips", "第3.2.1.12节，版本1.2.3.4，见999.888.777.666与1.234.567.890.1，12:30:45，1:2:3:4:5:6:7:8:9"),
        ("remove_links", "比值http与www，a//b，[1](2)，冒号://"),
        ("remove_phone_numbers", "共13812345678元，￥13812345678，12812345678，138123456789，0.13812345678"),
        (
            "remove_phone_numbers",
            "2022-08-13至2023-01-15，编号ab13812345678，1,381,234,567，0571-2022",
        ),
        ("remove_id_numbers", "流水号110105194912310021，又110105194913310029，订单1234567890123456789012"),
        ("remove_html", "若 a < b 且 c > d，则 List<T> 与 <人工> 不变，x<y"),
        ("remove_copyright_header", "#include <a.h>\n# 著作权许可办法\nint a;"),
        ("remove_repeated_sentences", "圆周率3.14，约3.14。是。是。"),
        ("expand_latex_macros", r"\def\a#1{b#1} \newcommand{\c}{a body that is far too long to be written out}"),
        ("normalize_spaces", "　　张　三\n    if a:\n\treturn 👨‍👩‍👧"),
    ],
)
def test_a_mapper_leaves_what_only_looks_like_it(operator, text):
    parameters = {"remove_repeated_sentences": {"min_chars": 4}, "expand_latex_macros": {"max_chars": 9}}
    parameters["normalize_spaces"] = {"collapse": False}
    assert MAPPERS[operator](text, **parameters.get(operator, {})) == text


@pytest.mark.parametrize("profile", ["none", "text", "zh-web", "steel-text", "steel-code"])
def test_chinese_punctuation_stays_as_it_is(profile):
    assert clean(f"{PROSE}\n{PUNCTUATION}\n{PROSE[::-1]}", profile)[0] == f"{PROSE}\n{PUNCTUATION}\n{PROSE[::-1]}"


@pytest.mark.parametrize("profile", [*sorted(path.stem for path in PROFILES.glob("*.yaml")), "own"])
def test_line_ends_of_any_system_are_cleaned_alike(profile, tmp_path):
    if profile == "own":
        profile = str(write_profile(tmp_path / "own.yaml", "steps: [{normalize_spaces: {collapse: false}}]"))
    for text in (f"{POEM} \n\n{ARTICLE}\n{ADVERTS[0]}\n网址：\n<p>résumé</p>\n", CODE, f"// Copyright A\n{CODE}"):
        expected = clean(text, profile)
        assert clean(text.replace("\n", "\r\n"), profile) == expected
        assert clean(text.replace("\n", "\r"), profile) == expected


@pytest.mark.parametrize(
    "operator, parameters, text, value",
    [
        ("text_length", {}, "春天a", 3),
        ("alphanumeric_share", {}, "春a1，。 \n\t", 3 / 8),
        ("special_share", {}, "春a1，。 \n😀", 6 / 8),
        ("han_share", {}, "春 〇々𠀀龦，a\n", 5 / 7),
        ("language", SCRIPTS, "用 Python 写的 print", "zh"),
        ("language", SCRIPTS, "The spring has come.", "en"),
        ("language", SCRIPTS, "Der Frühling wäre schön für uns.", "other"),
        ("language", SCRIPTS, "print(x); return [i for i in range(n)]", "en"),
        ("language", SCRIPTS, "Das Buch liegt auf dem Tisch und der Hund ist nicht im Garten.", "other"),
        ("language", SCRIPTS, "Il libro che ho letto non parla della guerra ma di una donna con il cane.", "other"),
        ("language", SCRIPTS, "Los libros que se leen en la escuela son para todos, no solo por el maestro.", "other"),
        ("language", SCRIPTS, "Het boek dat op de tafel ligt is niet van een van de kinderen.", "other"),
        ("language", SCRIPTS, "Buku yang ada di meja itu adalah milik saya dan tidak untuk dijual.", "other"),
        ("language", SCRIPTS, "Les enfants qui sont dans la maison ne vont pas sur la route avec le chien.", "other"),
        ("language", SCRIPTS, "春が来ました。桜がきれいですね。", "other"),
        ("language", SCRIPTS, "Весна пришла", "other"),
        ("language", SCRIPTS, "12.5 + 3", "other"),
        ("language", SCRIPTS, "tanα=sinα/cosα，故β=2α", "zh"),
        ("language", SCRIPTS, "他叫 Фёдор，是俄国人", "zh"),
        ("language", SCRIPTS, "桜の花，意思是樱花的花朵", "zh"),
        ("language", SCRIPTS, "The old café in the town is known for the crème that they have had for years.", "en"),
        ("average_line_length", {}, "abcd\nef", 3.5),
        ("max_line_length", {}, "abcd\nef", 4),
        ("prose_share", {}, "目录\n第一章\n他来了，又走了。后记\n", 10 / 15),
        ("duplicate_line_share", {}, "上一页\n春天\n上一页 \n", 3 / 9),
        ("advert_density", {"patterns": ["扫码", "加微信"]}, "扫码加微信吧" + "好" * 194, 10),
        ("character_repetition", {"n": 2}, "abababab", 4 / 7),
        ("character_repetition", {"n": 10}, "短", 0),
        ("repeated_share", {"n": 2}, "一二三一二四", 2 / 5),
        ("repeated_share", {"n": 1, "times": 3}, "一一一二二三", 3 / 6),
        ("word_count", {}, "春天来了 hello World 42", 7),
        ("word_repetition", {"n": 2}, "好的 Good day 好的 good day", 6 / 7),
    ],
)
def test_a_measure_measures_what_it_says(operator, parameters, text, value):
    found = MEASURES[operator](text, **parameters)
    assert found == (value if isinstance(value, str) else pytest.approx(value))


@pytest.mark.parametrize("operator", sorted(MEASURES))
def test_measures_take_empty_and_hostile_text(operator):
    parameters = {"advert_density": {"patterns": ["a"]}, "language": SCRIPTS}
    parameters |= {name: {"n": 10} for name in ("character_repetition", "repeated_share", "word_repetition")}
    for text in ("", "\n", "\ud800", "\U0010ffff"):
        found = MEASURES[operator](text, **parameters.get(operator, {}))
        assert found in ("zh", "en", "other") if operator == "language" else 0 <= found < float("inf")


@pytest.mark.slow
def test_no_text_makes_an_operator_slow():
    steps = [step for name in ("zh-web", "steel-text") for step in load_profile(name).steps]
    units = [
        "a",
        "0",
        " ",
        "\u3000 ",
        "a@",
        "www.",
        "[](http://a",
        "<a ",
        "<script>",
        "<!--",
        "1.1.",
        "！",
        "\\def\\a{",
    ]
    units += ["//\n", "/*", "扫", "\n ", "&#", "Ã©", "*", "来 ", "(0", "138 "]
    for unit in units:
        text = unit * (100_000 // len(unit)) + "x"
        for step in steps:
            start = time.process_time()
            (MAPPERS | MEASURES)[step.operator](text, **step.parameters)
            assert time.process_time() - start < 2, (unit, step.operator)


ADVERTS = [
    "扫码关注公众号，回复“资料”免费领取备考大礼包！",
    "长按识别下方二维码，添加客服微信了解更多详情",
    "点击下方“阅读原文”立即报名，名额有限，先到先得！",
    "责任编辑：张三丰 | 审核：李四",
    "版权归原作者所有，如有侵权请联系我们删除。",
    "咨询电话：010-62345678",
]


@pytest.mark.parametrize("advert", ADVERTS)
def test_adverts_and_boilerplate_go_and_the_text_around_them_stays(advert):
    body = f"{PROSE}\n{ARTICLE}"
    text, rule = clean(f"{body}\n{advert}\n后来呢？", "zh-web")
    assert rule is None
    assert text == f"{body}\n后来呢？"


def test_a_page_of_adverts_is_dropped_by_name():
    assert clean("\n".join(ADVERTS), "zh-web")[1] == "empty"
    assert clean("首页 新闻\n" * 40, "zh-web")[1] == "duplicate_line_share_above"
    assert clean("今天买明天卖大家都来看看吧今天买明天卖。" * 30, "text")[1] == "repeated_share_above"
    assert clean("Der Frühling wäre schön für alle Bücher. " * 9, "zh-web")[1] == "language_other"
    assert clean(PROSE[:4], "zh-web")[1] == "text_length_below"


def test_poems_survive_text_and_code_survives_steel_code():
    assert clean(POEM, "text") == (POEM, None)
    assert clean(f"{CODE}\n# mail me@a-b.com\n", "steel-code") == (f"{CODE}\n# mail", None)


def test_the_profile_none_changes_only_lines():
    text = "\ufeff  一，二\u2028三 \r\n\r\n\r\n\r\n\r\n  ﬁ １３８12345678 <b>\x00"
    assert clean(text, "none") == ("一，二\u2028三 \n\n\n  ﬁ １３８12345678 <b>", None)


def test_empty_text_is_dropped_as_such_whenever_it_becomes_empty(tmp_path):
    profile = load_profile(
        str(write_profile(tmp_path / "p.yaml", "steps: [{remove_spans: {patterns: [a]}}, han_share]"))
    )
    for text in ("", " \n\u3000", "aaa"):
        assert clean(text, profile)[1] == "empty"
    assert clean("", "none")[1] == "empty"


def test_scores_are_kept_and_changes_are_counted(tmp_path):
    profile = write_profile(
        tmp_path / "p.yaml",
        "steps:\n- remove_spans: {patterns: [a]}\n- convert_chinese: {config: t2s}\n- remove_spans: {patterns: [b]}\n"
        "- language: {min_han: 0.1, max_accented: 0.01}\n- han_share\n- text_length: {min: 3}\n",
    )
    cleaner = Cleaner({"web": load_profile(str(profile))})
    texts = ["漢字aab的，", "漢a", "中文字。"]
    documents = [Document(text, id=str(i), metadata={"source": "web"}) for i, text in enumerate(texts)]
    kept = list(cleaner.run(iter(documents)))
    assert [document.text for document in kept] == ["汉字的，", "中文字。"]
    assert kept[0].metadata == {"source": "web", "language": "zh", "han_share": 0.75, "text_length": 4}
    stats = cleaner.counts.to_json()
    expected = {"changed_remove_spans": 2, "changed_chars_remove_spans": 4, "changed_convert_chinese": 2}
    expected |= {"changed_chars_convert_chinese": 2, "language_zh": 2, "dropped_text_length_below": 1}
    assert {label: stats[label] for label in expected} == expected


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_profiles_are_plain_data(name):
    profile = load_profile(name)
    assert profile.name == name and pickle.loads(pickle.dumps(profile)) == profile
    assert json.loads(json.dumps(asdict(profile))) == asdict(profile)
    assert load_profile(str(PROFILES / f"{name}.yaml")) == profile


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps: [text_lenght]", r"p\.yaml: step 1: unknown operator `text_lenght`; did you mean `text_length`\?"),
        ("steps: [han_share, {text_length: {minimum: 3}}]", r"step 2, text_length: unknown parameter `minimum`; did"),
        ("steps: [{remove_links: {max: 3}}]", "remove_links: unknown parameter `max`; there are: none"),
        ("steps: [{text_length: {min: long}}]", "step 1, text_length, min is `long`; give a float"),
        ("steps: [{character_repetition: {n: true}}]", "n is `True`; give a int"),
        ("steps: [{character_repetition: {max: 0.2}}]", "character_repetition: parameter `n` is missing"),
        ("steps: [{remove_spans: {patterns: ['(']}}]", "remove_spans: missing \\), unterminated subpattern"),
        ("steps: [{remove_spans: {patterns: a}}]", "patterns is `a`; give a list of str"),
        ("steps: [{convert_chinese: {config: x2y}}]", "convert_chinese: x2y"),
        ("steps: [{text_length: 3}]", "text_length: `3` are not parameters"),
        ("steps: [{a: 1, b: 2}]", "is not an operator; write"),
        ("steps: {a: 1}", "a profile has one key, `steps`, with a list"),
        ("steps: []\nmore: 1", "a profile has one key, `steps`"),
        ("steps: [", r"p\.yaml is not valid YAML: .* line 1"),
    ],
)
def test_mistakes_in_a_profile_are_named(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_profile(str(write_profile(tmp_path / "p.yaml", text)))


def test_an_unknown_profile_is_answered_with_those_there_are():
    with pytest.raises(UserError, match="no profile `zhweb`; use one of none, steel-code, steel-text, text, zh-web"):
        load_profile("zhweb")


@needs_data
@pytest.mark.parametrize("name", ["zh_laws", "zh_novels", "zh_song_ci", "zh_d2l", "zh_vue_docs", "en_books"])
def test_clean_text_is_hardly_ever_dropped(name):
    texts, rules = read(f"{name}.jsonl.gz", rows=1500), Counter()
    for text in texts:
        rules[clean(text, "text")[1]] += 1
    assert (len(texts) - rules[None]) / len(texts) < 0.02, rules


@needs_data
def test_adverts_go_from_real_web_text():
    texts = read("wanjuan_zh_web_sample.jsonl.gz", "content")
    cleaned = [clean(text, "zh-web") for text in texts]
    kept = [text for text, rule in cleaned if rule is None]
    assert len(kept) > 0.99 * len(texts)
    for advert in (
        "阅读原文",
        "扫码关注",
        "版权归",
        "如有侵权",
        "责任编辑[:：|]",
        r"\[phone number\]",
        "0898—66638118",
    ):
        before = sum(bool(re.search(advert, text)) for text in texts)
        after = sum(bool(re.search(advert, text)) for text in kept)
        assert after <= before / 4, (advert, before, after)
    assert sum(map(len, kept)) > 0.8 * sum(map(len, texts))


@needs_data
def test_the_short_way_around_ftfy_changes_nothing():
    texts = [*read("wanjuan_zh_web_sample.jsonl.gz", "content", 300), *read("zh_vue_docs.jsonl.gz", rows=40)]
    for line in "\n".join(texts).split("\n"):
        assert MAPPERS["fix_unicode"](line, unescape_html=False) == ftfy.fix_text(line, FTFY)


def drop(folder: Path, rank: int, texts: list[str], rule: str = "text_length_below", **metadata) -> None:
    with ExampleWriter(folder) as writer:
        for i, text in enumerate(texts):
            writer.write(Document(text, id=f"web.jsonl:{i}", metadata={"filter_reason": rule} | metadata), rank)


MANIFEST = {
    "documents": 14,
    "tokens": 3000,
    "text_bytes": 9000,
    "sources": [
        {
            "name": "web",
            "language": "zh",
            "tokens": 2000,
            "documents": 10,
            "text_bytes": 6000,
            "epochs": 1,
            "share": 0.8,
        },
        {
            "name": "书 $x_",
            "language": None,
            "tokens": 1000,
            "documents": 4,
            "text_bytes": 3000,
            "epochs": 0.5,
            "share": 0.2,
        },
    ],
    "cleaning": {
        "web": {
            "read": 20,
            "written": 10,
            "dropped_text_length_below": 5,
            "dropped_exam_cmmlu": 1,
            "dropped_duplicate": 2,
            "dropped_held_out": 2,
            "changed_remove_links": 4,
            "changed_chars_remove_links": 77,
            "language_zh": 12,
        },
        "书 $x_": {"read": 4, "written": 4},
    },
    "generations": [{"profiles": {name: asdict(load_profile(name)) for name in ("text", "zh-web")}}],
}


def test_examples_are_few_short_and_of_every_rule(tmp_path):
    for rank in (0, 1):
        drop(tmp_path, rank, ["长" * 10_000] * 9, text_length=7)
    rows = [json.loads(line) for path in sorted(tmp_path.iterdir()) for line in path.read_bytes().splitlines()]
    assert len(rows) == 2 * EXAMPLES and {row["value"] for row in rows} == {7}
    assert all(len(row["text"]) == EXCERPT + 1 for row in rows)


@pytest.mark.slow
def test_the_report_says_what_was_counted(tmp_path):
    drop(tmp_path / "examples" / "clean", 0, ["太短"], text_length=2)
    drop(tmp_path / "examples" / "read", 0, ["不好"], "low_score", score=0.5)
    drop(tmp_path / "examples" / "exams", 0, ["考题"], "exam_cmmlu", exam_item="下列哪一项")
    drop(tmp_path / "examples" / "twins", 0, ["又来"], "duplicate", copy_of={"id": "a.jsonl:7", "text": "来"})
    write_report(tmp_path, MANIFEST, tmp_path / "examples")
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in (
        "| web | zh | 10 | 2,000 | 0.01 | 1 | 80.00% |",
        "| web | 20 | 10 | 2 | 8 | 40.00% |",
        "| all | 24 | 14 | 2 | 8 | 33.33% |",
        "| text_length_below | 5 (20.83%) | 5 (25.00%) |  |",
        "| remove_links | 77 | 4 (16.67%) | 4 (20.00%) |  |",
        "| zh | 12 (50.00%) | 12 (60.00%) |  |",
        "### text_length_below\n\nNumber of characters. `min` is 5 in text, 5 in zh-web.\n\n"
        "web.jsonl:0: 2\n\n```text\n太短",
        "### low_score\n\nweb.jsonl:0: 0.5\n\n```text\n不好",
        "### exam_cmmlu\n\nweb.jsonl:0\n\n```text\n考题\n```\n\nBenchmark item:\n\n```text\n下列哪一项\n```",
        "### duplicate\n\nweb.jsonl:0\n\n```text\n又来\n```\n\nCopy of a.jsonl:7\n\n```text\n来\n```",
    ):
        assert line in report
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 800 and picture.height > 200


@pytest.mark.slow
def test_no_example_can_leave_its_block(tmp_path):
    hostile = "a\n```\n# 标题\r\n<script>x</script>\u2028| b |\n`````\n![](http://a)\x1b[31m"
    drop(tmp_path / "examples" / "clean", 0, [hostile], "exam_<b>|[x](y)`")
    names = {"<i>|\n# h": {"read": 1, "written": 0, "dropped_exam_<b>|[x](y)`": 1}}
    sources = [MANIFEST["sources"][0] | {"name": "<i>|\n# h"}]
    write_report(tmp_path, MANIFEST | {"cleaning": names, "sources": sources}, tmp_path / "examples")
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    head, block = report.split("``````text\n")
    assert block.count("\n") == 2 and block.endswith("\n``````\n")
    assert not re.search(r"<i>|<b>|\[x\]|`|\r|\u2028|\x1b", head)
    assert [line for line in head.split("\n") if line.startswith("# ")] == ["# Data report"]
    widths = {line.count("|") for line in head.split("## Mixture")[1].split("\n\n")[1].split("\n")}
    assert widths == {8}


LINES = yaml.safe_load(Path(__file__).with_name("zh_web_lines.yaml").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("rule", LINES)
def test_zh_web_removes_boilerplate_and_no_prose(rule):
    """Precision (also the table in docs/data.md): lines rightly removed, of all removed or changed."""

    def survives(line: str) -> bool:
        text, broken = clean(f"{PROSE}\n{ARTICLE}\n{line}\n{PROSE[::-1]}", "zh-web")
        return broken is None and line in text.split("\n")

    lost = [line for line in LINES[rule]["keep"] if not survives(line)]
    missed = [line for line in LINES[rule]["remove"] if survives(line)]
    removed = len(LINES[rule]["remove"]) - len(missed)
    assert removed / (removed + len(lost)) >= 0.95, lost
    assert removed >= 0.9 * len(LINES[rule]["remove"]), missed


DOCUMENTS = yaml.safe_load(Path(__file__).with_name("zh_web_documents.yaml").read_text(encoding="utf-8"))
LEAD = "城南的老茶馆下个月就要搬走了，开了四十年的店铺将变成一家书店，老顾客们都来告别，有人带来了当年的照片。\n"
DOCUMENTS["keep"] |= {
    "a page whose lead is repeated": LEAD
    + LEAD
    + "店主说，搬走是因为房租涨得太快，年轻人更喜欢喝咖啡，只有老人还来坐坐。",
    "a long answer without line ends": "".join(
        f"第{number}天，我们沿着河往上游走，看见了{number}座桥和更多的渡船。" for number in range(1, 300)
    ),
    "a page of code": "下面的程序读取文件，并且统计每个词出现的次数。\n"
    + "\n".join(f"    total_{number} = count(words, key_{number})" for number in range(8)),
}


@pytest.mark.parametrize("name", DOCUMENTS["keep"])
def test_zh_web_keeps_documents(name):
    spaces = re.compile("[ \\t]+")
    text, rule = clean(DOCUMENTS["keep"][name], "zh-web")
    assert rule is None
    lines = [spaces.sub(" ", line) for line in text.split("\n")]
    for line in DOCUMENTS["keep"][name].strip().split("\n"):
        assert spaces.sub(" ", line).rstrip() in lines


@pytest.mark.parametrize("rule", DOCUMENTS["drop"])
def test_zh_web_drops_documents_by_name(rule):
    for text in DOCUMENTS["drop"][rule]:
        assert clean(text, "zh-web")[1] == rule, text


def test_bold_marks_go_and_stars_of_programs_stay():
    bold = MAPPERS["remove_bold"]
    assert (
        bold("# 一\n先看**第二章**，再看，**第三章**。\n**Bold** text")
        == "# 一\n先看第二章，再看，第三章。\nBold text"
    )
    assert bold("**重点**\n先看****第二章**** 138****5678") == "重点\n先看第二章 138****5678"
    for text in ("def f(a, **b): return g(**b)", "2**3 + 4**5", "f(*args, **kwargs) and g(**kwargs)", "/** a */"):
        assert bold(f"# 一\n{text}") == f"# 一\n{text}"
    assert bold("什么**玩意啊，太**了") == "什么**玩意啊，太**了"  # no Markdown: the stars hide words


@pytest.mark.slow
def test_a_text_above_the_longest_is_split_not_dropped(tmp_path):
    rng = random.Random(0)
    novel = "".join("".join(rng.choices(PROSE[:40], k=5) + rng.choices(HAN, k=30)) + "。\n" for _ in range(30_000))
    assert len(novel) > 1_000_000
    for profile, longest in (("text", 1_000_000), ("zh-web", 100_000)):
        cleaner = Cleaner({"web": load_profile(profile)})
        parts = list(cleaner.run(iter([Document(novel, id="a:1", metadata={"source": "web"})])))
        assert "".join(f"{part.text}\n" for part in parts) == novel
        assert max(len(part.text) for part in parts) <= longest
        assert [part.id for part in parts] == [f"a:1#{number + 1}" for number in range(len(parts))]
    own = load_profile(str(write_profile(tmp_path / "own.yaml", "max_chars: 10\nsteps: [normalize_lines]")))
    parts = list(Cleaner({"web": own}).run(iter([Document("a" * 25, id="0", metadata={"source": "web"})])))
    assert [part.text for part in parts] == ["a" * 9, "a" * 8, "a" * 8]
    with pytest.raises(UserError, match="max_chars is `0`; give a number of characters, at least 1"):
        load_profile(str(write_profile(tmp_path / "own.yaml", "max_chars: 0\nsteps: []")))
