"""Deduplication: planted duplicates are found, the first copy is kept, and order and kills change nothing."""

import json
import random
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from buddygpt.cli.errors import UserError
from buddygpt.data.text.pipeline import DocumentReader, Stage
from buddygpt.data.text.plan import FINGERPRINTS
from buddygpt.data.text.steps.deduplicate import (
    INDEX_FOLDERS,
    DuplicateFilter,
    duplicate_stages,
    link_to_first,
    shingles,
)
from buddygpt.data.text.steps.ngrams import PIECE, find_units, hash_ngrams, hash_units
from buddygpt.data.text.steps.templates import differ_in_names, pack_units

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
WORDS = [f"{start}{end}" for start in ("con", "re", "tra", "mo", "sil", "ver") for end in ("ta", "ner", "lid", "mos")]

OUTPUTS = {"signatures": ["signatures", "sketches", "units"], "buckets": ["pairs"], "clusters": ["removed"]}


def write_documents(work: Path, tasks: list[list[str]]) -> None:
    (work / "documents").mkdir(parents=True)
    for rank, texts in enumerate(tasks):
        rows = [{"text": text, "id": f"{rank}:{row}", "metadata": {}} for row, text in enumerate(texts)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (work / "documents" / f"{rank:05d}.jsonl").write_text(lines, encoding="utf-8")


def run_stage(stage: Stage, ranks: list[int] | None = None) -> None:
    for rank in range(stage.tasks) if ranks is None else ranks:
        data = None
        for step in stage.steps:
            data = step(data, rank, stage.tasks)


def kept(
    work: Path, method: str, tasks: list[list[str]], index: Path | None = None, known: int = 0
) -> list[list[int]]:
    """Return the rows of each task that are kept."""
    write_documents(work, tasks)
    for stage in duplicate_stages(method, work, len(tasks), index, known):
        run_stage(stage)
    return read_kept(work, method, len(tasks), known)


def read_kept(work: Path, method: str, tasks: int, known: int = 0) -> list[list[int]]:
    rows = []
    for rank in range(tasks):
        step = DuplicateFilter(method, work, known)
        documents = step(DocumentReader(work / "documents")(None, rank, tasks), rank, tasks)
        rows.append([int(document.id.split(":")[1]) for document in documents])
    return rows


def jaccard(first: list[str], second: list[str]) -> float:
    """Return the similarity of the runs of five units, with an independent implementation."""
    a, b = ({tuple(units[i : i + 5]) for i in range(len(units) - 4)} for units in (first, second))
    return len(a & b) / len(a | b)


def planted_pair(rng: random.Random, alphabet: list[str], similarity: float) -> tuple[list[str], list[str], float]:
    """Return two texts as units, the second edited (replaced, dropped, doubled) until it is less similar."""
    first = [rng.choice(alphabet) for _ in range(rng.randint(150, 600))]
    second, last = list(first), 1.0
    while last > similarity:
        place = rng.randrange(len(second))
        second[place : place + 1] = rng.choice([[rng.choice(alphabet)], [], [second[place]] * 2])
        last = jaccard(first, second)
    return first, second, last


@pytest.mark.slow
@pytest.mark.parametrize("alphabet, separator", [(HAN, ""), (["q" + word for word in WORDS] + HAN[:200], " ")])
def test_planted_near_duplicates_are_found_across_tasks(tmp_path, alphabet, separator):
    rng = random.Random(7)
    pairs = [planted_pair(rng, alphabet, 0.8) for _ in range(400)]
    assert np.mean([similarity for *_, similarity in pairs]) < 0.8
    originals, copies = ([separator.join(units) for units in side] for side in list(zip(*pairs, strict=True))[:2])
    unrelated = [separator.join(rng.choice(alphabet) for _ in range(300)) for _ in range(400)]
    first, second = kept(tmp_path, "minhash", [originals, copies + unrelated])
    assert first == list(range(400))
    assert 400 - len([row for row in second if row < 400]) >= 0.95 * 400
    assert [row for row in second if row >= 400] == list(range(400, 800))


@pytest.mark.slow
def test_documents_of_one_frame_are_kept(tmp_path):
    """Pages that share a third of their text meet in a bucket by chance where there are many; each stays."""
    rng = random.Random(3)
    frame = "".join(rng.choices(HAN, k=120))
    pages = [frame + "".join(rng.choices(HAN, k=150)) for _ in range(600)]
    assert kept(tmp_path, "minhash", [pages]) == [list(range(600))]
    pairs = sum(file.stat().st_size for file in (tmp_path / "duplicates" / "minhash" / "pairs").iterdir())
    assert pairs > 0  # so the sketches were asked


LEASE = """The owner lets the house at the old mill to {c} from the first of May, with the garden and the shed.
The rent is due on the first day of each month, and the owner keeps a deposit until the end of the contract.
The owner repairs the roof and the heating at her own cost, while {c} keeps the garden in order and cleans the gutters
twice a year, before the winter and after it. Nobody may keep animals in the rooms unless the owner agrees in writing.
If the rent is late by more than two weeks, the owner may end the contract, and {c} leaves the house within a month.
When the keys are handed back, both look at the rooms together, and {c} gets the deposit back, less the repairs."""
STATUTE = """{p}公园管理条例。第一条，为了加强公园的保护和管理，根据国家有关规定，结合{p}实际，制定本条例。第二条，
本条例适用于公园的规划、建设、保护和管理。第三条，{p}人民政府应当将公园经费列入预算，保障公园的日常养护，并定期向社会公布。第四条，在
公园内设置广告应当经过批准。第五条，游客应当爱护花草树木，不得在湖中游泳；违反规定的，处以五十元以上二百元以下罚款。第六条，
{p}鼓励单位和个人捐资建设公园，具体办法另行规定。第七条，本条例自公布之日起施行。"""
NEWS = """受冷空气影响，本周三起我市将出现降雨，气温下降六到八度，市民出行请注意添衣。
农业部门提醒农户抓紧抢收，防止倒伏。
交通部门表示，雨天路滑，司机要减速慢行，学校周边会增派人手。菜市场里，青菜价格比上周略有上涨。预计周末雨停，气温回升。"""


def test_documents_that_fill_a_template_with_other_names_are_kept(tmp_path):
    """Two leases and two statutes are no copies, a second copy of each is; neither are edits of a text other texts."""
    leases = [LEASE.format(c=name) for name in ("Anna Weber", "Tom Lund")]
    statutes = [STATUTE.format(p=place) for place in ("江州省", "宁海市")]
    for texts in (leases, statutes):
        first, second = (re.findall(r"[^\W_\u4e00-\u9fff]+|[\u4e00-\u9fff]", text.lower()) for text in texts)
        assert 0.65 < jaccard(first, second) < 0.85
    edits = [
        NEWS + "责任编辑：小李。分享到微博，上一篇，下一篇。",
        NEWS.replace("市民", "大家").replace("预计", "估计"),
        NEWS[12:],
    ]
    dated = [
        f"{NEWS[:90]}发布于{year}年{month}月，浏览{views}次。"
        for year, month, views in ((2019, 3, 812), (2021, 11, 77))
    ]
    texts = [*leases, *statutes, *leases, *statutes, NEWS, *edits]
    assert kept(tmp_path / "all", "minhash", [texts]) == [[0, 1, 2, 3, 8]]
    assert kept(tmp_path / "dates", "minhash", [dated]) == [[0]]
    pairs = [[pack_units(*find_units(text)) for text in pair] for pair in (leases, statutes, dated, [NEWS, edits[1]])]
    assert [differ_in_names(*pair) for pair in pairs] == [True, True, False, False]


def test_short_and_wordless_copies_are_found(tmp_path):
    texts = ["你好", "！？……", "hello", "", "a b c d e f", "再见"]
    assert kept(tmp_path, "minhash", [texts, texts[::-1]]) == [list(range(6)), []]


def test_width_case_and_punctuation_make_no_difference(tmp_path):
    texts = ["机器学习ABC是研究算法的学科，2024年。", "机器学习ａｂｃ是研究 算法的学科 ２０２４年"]
    assert kept(tmp_path / "minhash", "minhash", [texts]) == [[0]]
    assert kept(tmp_path / "exact", "exact", [texts]) == [[0, 1]]


def test_exact_keeps_the_first_by_task_and_row(tmp_path):
    """datatrove's own exact stage goes by row before task."""
    tasks = [["甲", "乙乙", "丙丙丙"], ["丙丙丙", "丁"], ["丁", "甲", "甲 "]]
    assert kept(tmp_path, "exact", tasks) == [[0, 1, 2], [1], [2]]


def test_a_chain_keeps_its_first_document():
    pairs = np.array([[7 << 32, 9], [9, 3 << 32 | 5], [1 << 32, 2 << 32]], np.uint64)
    assert link_to_first(pairs).tolist() == [[1 << 32, 2 << 32], [9, 3 << 32 | 5], [9, 7 << 32]]


@pytest.mark.slow
def test_order_and_split_of_the_work_change_nothing(tmp_path):
    rng = random.Random(5)
    texts = ["".join(rng.choices(HAN, k=rng.randint(3, 200))) for _ in range(60)] * 2
    rng.shuffle(texts)
    outcome = {}
    for name, size in {"one": 120, "four": 30, "many": 9}.items():
        tasks = [texts[start : start + size] for start in range(0, 120, size)]
        rows = kept(tmp_path / name, "minhash", tasks)
        outcome[name] = [task[row] for task, numbers in zip(tasks, rows, strict=True) for row in numbers]
    assert outcome["one"] == outcome["four"] == outcome["many"] == list(dict.fromkeys(texts))

    work = tmp_path / "reversed"
    write_documents(work, [texts[start : start + 30] for start in range(0, 120, 30)])
    for stage in duplicate_stages("minhash", work, 4):
        run_stage(stage, list(reversed(range(stage.tasks))))
    assert contents(work) == contents(tmp_path / "four")


@pytest.mark.slow
def test_a_stage_run_again_after_a_kill_leaves_the_same_bytes(tmp_path):
    texts = [[f"{'长' * (row % 7)}文{row // 2}章" for row in range(50)] for _ in range(3)]
    kept(tmp_path / "whole", "minhash", texts)
    write_documents(tmp_path / "killed", texts)
    for stage in duplicate_stages("minhash", tmp_path / "killed", 3):
        run_stage(stage)
        for path in (tmp_path / "killed" / "duplicates").rglob("*"):
            if path.is_file() and set(OUTPUTS[stage.name]) & set(path.parts):
                path.write_bytes(path.read_bytes()[:-3] + b"rubbish")  # as if it had been stopped while writing
        run_stage(stage)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def contents(work: Path) -> dict[Path, bytes]:
    return {path.relative_to(work): path.read_bytes() for path in sorted(work.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_appended_text_is_compared_with_earlier_rounds(tmp_path):
    rng = random.Random(1)
    old, new, newer = (["".join(rng.choices(HAN, k=100)) for _ in range(20)] for _ in range(3))
    for method in ("minhash", "exact"):
        published = tmp_path / f"index_{method}"
        assert kept(tmp_path / f"1{method}", method, [old]) == [list(range(20))]
        publish(tmp_path / f"1{method}", published)
        second = [old[:3] + new, [new[0], old[5]]]
        assert kept(tmp_path / f"2{method}", method, second, published, 1) == [list(range(3, 23)), []]
        publish(tmp_path / f"2{method}", published)
        assert kept(tmp_path / f"3{method}", method, [newer + old[:1] + new[:1]], published, 3) == [list(range(20))]
        only_first = kept(
            tmp_path / f"4{method}", method, [old[:1] + new], published, 1
        )  # the others: of a stopped run
        assert only_first == [list(range(1, 21))]


def publish(work: Path, index: Path) -> None:
    """Move an index to those of earlier rounds. No file of two rounds has the same name."""
    new = work / "duplicates" / "index"
    for file in filter(Path.is_file, new.rglob("*")):
        target = index / file.relative_to(new)
        assert not target.exists()
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)


@pytest.mark.slow
def test_an_append_keeps_and_drops_the_same_as_one_run(tmp_path):
    """Near copies at every similarity, and pages of one frame, which meet old ones by chance."""
    rng = random.Random(3)
    frame = "".join(rng.choices(HAN, k=120))
    pages = [[frame + "".join(rng.choices(HAN, k=150)) for _ in range(600)] for _ in range(2)]
    pairs = [planted_pair(rng, HAN, similarity) for similarity in np.linspace(0.3, 0.95, 200)]
    old, new = (["".join(units) for units in side] for side in list(zip(*pairs, strict=True))[:2])
    tasks = [old + pages[0], new + pages[1]]
    whole = kept(tmp_path / "whole", "minhash", tasks)
    assert whole[0] == list(range(800)) and set(range(200, 800)) < set(whole[1]) != set(range(800))
    kept(tmp_path / "first", "minhash", tasks[:1])
    publish(tmp_path / "first", tmp_path / "index")
    assert kept(tmp_path / "second", "minhash", tasks[1:], tmp_path / "index", 1) == whole[1:]


def test_dropped_documents_name_the_document_that_is_kept(tmp_path):
    def originals(work: Path, known: int) -> list[dict | None]:
        documents = list(DocumentReader(work / "documents")(None, 0, 1))
        list(DuplicateFilter("exact", work, known)(iter(documents), 0, 1))
        return [document.metadata.get("copy_of") for document in documents]

    kept(tmp_path / "first", "exact", [["甲", "乙", "乙", "甲"]])
    copy_of = [None, None, {"id": "0:1", "text": "乙"}, {"id": "0:0", "text": "甲"}]
    assert originals(tmp_path / "first", 0) == copy_of
    publish(tmp_path / "first", tmp_path / "index")
    kept(tmp_path / "second", "exact", [["丙", "甲"]], tmp_path / "index", 1)
    earlier = {"id": "a document of an earlier append round", "text": ""}
    assert originals(tmp_path / "second", 1) == [None, earlier]


def test_duplicates_are_dropped_also_if_an_earlier_step_drops_documents(tmp_path):
    kept(tmp_path, "exact", [["甲", "乙", "乙", "丙", "甲"]])
    documents = list(DocumentReader(tmp_path / "documents")(None, 0, 1))
    left = DuplicateFilter("exact", tmp_path)(iter(documents[1:2] + documents[3:]), 0, 1)
    assert [document.text for document in left] == ["乙", "丙"]


def test_an_incomplete_index_is_refused(tmp_path):
    kept(tmp_path, "exact", [["甲"]])
    for method, known in (("minhash", 1), ("exact", 2)):
        message = rf"{INDEX_FOLDERS[method]}/signatures/bucket_000/0000{known - 1}\S+ is missing: duplicates"
        with pytest.raises(UserError, match=message):
            duplicate_stages(method, tmp_path, 1, tmp_path / "duplicates" / "index", known)


def test_an_index_with_fingerprints_of_an_older_version_is_refused(tmp_path):
    kept(tmp_path / "first", "minhash", [["甲"]])
    index = tmp_path / "first" / "duplicates" / "index"
    folder = index / INDEX_FOLDERS["minhash"]
    for older in ("minhash", "minhash-2"):
        folder = folder.rename(index / older)
        message = "index was made by an older version, with other fingerprints: .* Prepare all"
        with pytest.raises(UserError, match=message):
            duplicate_stages("minhash", tmp_path / "second", 1, index, 1)


def test_new_hashes_need_a_new_version():
    """If this fails, raise FINGERPRINTS: an index of other hashes would match nothing, silently."""
    text = "国際標準の図書館, 甚麼 in the 21st century"
    assert (FINGERPRINTS, hash_ngrams(hash_units(text), 5)[0]) == (3, 17512226073964478763)


def test_a_traditional_copy_of_a_text_is_a_duplicate(tmp_path):
    simplified = "那里的线路只有几里长，后来发电厂为了这件事，在台上干了什么，大家都说不清，只看着窗外的群峰。"
    traditional = "那裡的線路只有幾里長，後來發電廠為了這件事，在臺上乾了什麼，大家都說不清，只看著窗外的羣峯。"
    hong_kong = "那裏的綫路只有幾里長，後來發電廠爲了這件事，在台上干了甚麼，大家都説不清，只看着窗外的羣峰。"
    assert kept(tmp_path, "minhash", [[simplified, traditional], [hong_kong]]) == [[0], []]
    assert hash_units("麼么幺裡裏里著着").tolist() == hash_units("么么么里里里着着").tolist()
    other = "甚麼祇妳牠彷彿台臺対図読気発変実黒徳沢竜戸ｶﾞＡ１"
    assert hash_units(other).tolist() == hash_units("什么只你它仿佛台台对图读气发变实黑德泽龙户ガa1").tolist()
    assert len(set(hash_units("他她它你您国哪那做作像象").tolist())) == 12
    assert kept(tmp_path / "exact", "exact", [[simplified, traditional]]) == [[0, 1]]


def test_more_tasks_than_files_may_be_open(tmp_path, monkeypatch):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, limit[1]))
        assert kept(tmp_path, "exact", [[str(number % 3)] for number in range(200)])[3:] == [[]] * 197
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 256))
    with pytest.raises(UserError, match="200 tasks need 300 open files, but the limit is 256; set fewer `tasks`"):
        run_stage(duplicate_stages("exact", tmp_path, 200)[1])


def test_units_are_those_of_a_plain_implementation():
    text = "Hello，世界！ＡＢＣ1２３ de\u3000f-g 𠀀ｱ ½ ①\n\n「東京」tower's end"
    plain = ["hello", "世", "界", "abc123", "de", "f", "g", "𠀀", "ア", "1", "2", "1", "東", "京", "tower", "s", "end"]
    hashes = hash_units(text)
    assert hashes.tolist() == [hash_units(unit)[0] for unit in plain]
    assert len(set(hashes.tolist())) == len(set(plain))
    assert len(hash_ngrams(hashes, 5)) == len(plain) - 4
    assert hash_ngrams(hashes[:3], 5).tolist() == hash_ngrams(hashes[:3], 3).tolist()


@pytest.mark.slow
def test_a_text_of_many_pieces_has_the_shingles_of_its_parts():
    text = "".join(random.Random(2).choices(HAN, k=PIECE + 1000))
    assert len(re.sub(r"\s", "", text)) == len(hash_units(text))
    assert np.isin(shingles(text[PIECE - 50 : PIECE + 50]), shingles(text)).all()
