"""The layout: imports form a DAG of folders, tools are never imported, and optional steps load only on demand."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

# folder -> the folders it may import
ALLOWED = {
    "model": set(),
    "cli": {"model"},
    "data": {"cli"},
    "tokenizer": {"cli", "data"},
    "training": {"cli", "model"},
    "check": {"cli", "model"},
    "export": {"cli", "model", "training"},
    "eval": {"cli", "data", "model", "training"},
    "planning": {"cli", "model", "training"},
    "pretrain": {"cli", "data", "model", "training"},
    "sft": {"cli", "data", "model", "training"},
    "rlhf": {"cli", "data", "model", "training"},
    "runs": {"cli", "data", "export", "model", "planning", "training"},
    "tools": {"check", "cli", "data", "export", "model", "planning", "pretrain", "tokenizer", "training"},
}
STEPS = "buddygpt.data.text.steps"


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(tree: ast.AST) -> set[str]:
    """Names of all modules that the statements of `tree` import; relative imports are left out."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_folders_below_it(folder):
    for path in python_files(folder):
        modules = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
        folders = {name.split(".")[1] for name in modules if name.startswith("buddygpt.")}
        assert folders <= ALLOWED[folder] | {folder}, path


def test_every_package_is_part_of_the_layout():
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/*.py")}
    assert folders - {"tests"} == set(ALLOWED)


def test_files_of_tests_have_different_names():
    """pytest imports a file under its name, without its folder, and leaves out the second of the same name."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(names) == sorted(set(names))


def test_optional_steps_are_imported_inside_functions_only():
    for folder in ("data", "eval", "pretrain", "sft", "rlhf", "training"):
        for path in python_files(folder):
            if path.parent.name == "steps":
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            modules = imported_modules(ast.Module(statements, []))
            assert not any(name.startswith(STEPS) for name in modules), path


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_reading_order_names_files_with_their_size(readme):
    rows = re.findall(r"^\| \d+ \| `([^`]+)` \| (\d+) \|", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 12
    for name, lines in rows:
        length = (ROOT / name).read_text(encoding="utf-8").count("\n")
        assert abs(length - int(lines)) <= 0.1 * length + 5, f"{name} has {length} lines, {readme} says {lines}"


@pytest.mark.parametrize("readme", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("**/README*.md")
                                          if not {".venv", "outputs", "datasets"} & set(path.parts)))  # fmt: skip
def test_links_of_a_readme_lead_somewhere(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (ROOT / readme).parent.joinpath(target).exists(), target
