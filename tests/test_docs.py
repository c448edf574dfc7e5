"""The documentation: quoted messages exist, both languages say the same, links and the site are whole."""

import ast
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
import yaml
from conftest import ROOT

from buddygpt.data.text.sources import SourceEntry, load_readers

CODE = ("check", "cli", "data", "eval", "export", "model", "pretrain", "rlhf", "runs", "sft", "tokenizer", "training")
TRANSLATED = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.with_stem(f"{path.stem}_zh").exists())


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def chinese(name: str) -> str:
    return name.replace(".md", "_zh.md")


@cache
def texts_of_the_code() -> str:
    """Return all strings of the code, one a line, with `...` for what an f-string fills in."""
    texts = []
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                    texts.append("".join(parts).replace("\n", " "))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value.replace("\n", " "))
    return "\n".join(texts)


def messages(name: str) -> list[str]:
    return [message.strip() for _, message in re.findall(r"^### (`+)(.+?)\1$", page(name), re.MULTILINE)]


def test_quoted_messages_are_those_of_the_code():
    quoted = messages("troubleshooting.md")
    assert len(quoted) > 30
    for message in quoted:
        pieces = [re.escape(piece) for piece in message.split("...")]
        assert re.search(".*".join(pieces), texts_of_the_code()), message


def test_both_languages_quote_the_same_messages():
    assert messages("troubleshooting.md") == messages("troubleshooting_zh.md")


def fenced(name: str) -> list[str]:
    """Return the code blocks of a page, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page(name), re.MULTILINE | re.DOTALL)
    return [re.sub(r" +# .*", "", block) for block in blocks]


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_have_the_same_parts_commands_and_figures(name):
    other = chinese(name)
    for pattern in (r"^#+ ", r"(?<=\| )[\d.,%]+(?= \|)"):  # headings, and cells of tables that hold a figure
        assert re.findall(pattern, page(name), re.MULTILINE) == re.findall(pattern, page(other), re.MULTILINE)
    assert fenced(name) == fenced(other)


def test_the_first_corpus_is_read_by_known_readers():
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page("corpus.md"), re.MULTILINE | re.DOTALL)
    for source in yaml.safe_load(block)["sources"]:
        assert source.get("reader", "columns") in load_readers()
        assert source.keys() <= set(SourceEntry.__dataclass_fields__)


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert "://" in target or path.parent.joinpath(target).exists(), target


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("material"), reason="needs mkdocs-material: pip install -r requirements-dev.txt")
def test_the_site_is_whole_and_asks_no_other_server(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not result.returncode, result.stderr[-3000:]
    for name, language in (("index.html", "en"), ("README_zh.html", "zh"), ("docs/faq_zh.html", "zh")):
        html = (tmp_path / name).read_text(encoding="utf-8")
        assert f'<html lang="{language}"' in html
        loaded = re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"?(https?:[^\">\s]+)", html)
        assert not loaded
        styles = re.findall(r"@import[^;]+;|url\(https?:[^)]+\)", html)
        assert not styles
