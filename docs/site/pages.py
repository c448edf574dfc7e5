"""MkDocs hook: the site shows the Markdown files of the whole repository, at the paths that they have there.

So relative links work on the site as they do in the repository, and no page exists twice.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "[!.]*/*.md", "[!.]*/*/README.md")
OTHER_FOLDERS = ("outputs", "datasets")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
CODE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
LINE_END = re.compile(r"(?<=[\u4e00-\u9fff，。；：、）])\n(?=[\u4e00-\u9fff（])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the pages of the repository, and the pictures and other files that they link to."""
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern) if _folder(path) not in OTHER_FOLDERS}
    linked = {path for page in pages for path in _linked_files(page)}
    theme = [file for file in files if file.generated_by or not file.abs_src_path.startswith(config.docs_dir)]
    names = sorted(path.relative_to(ROOT).as_posix() for path in pages | linked | {ROOT / "docs/site/style.css"})
    return Files(theme + [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Join lines of Chinese text, between which a browser would show a space; not those of code."""
    texts = CODE.split(markdown)
    return "".join(text if number % 2 else LINE_END.sub("", text) for number, text in enumerate(texts))


def on_page_context(context: dict[str, Any], page: Page, config: MkDocsConfig, nav: object) -> dict[str, Any]:
    """Write the menus and buttons of a Chinese page in Chinese."""
    config.theme["language"] = "zh" if page.file.src_uri.endswith("_zh.md") else "en"
    return context


def _folder(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def _linked_files(page: Path) -> set[Path]:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    found = {(page.parent / target).resolve() for target in targets}
    return {path for path in found if path.is_file() and path.is_relative_to(ROOT)}
