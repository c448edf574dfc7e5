"""The commands of the READMEs and docs: scripts, config files and options exist."""

import contextlib
import importlib
import io
import re
import shlex

import pytest
from conftest import ROOT, run

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "*/*.md")
    for path in ROOT.glob(pattern)
    if path.relative_to(ROOT).parts[0] not in (".venv", "outputs", "datasets")
)
START = re.compile(r"(?:PATH=\S+ |CUDA_VISIBLE_DEVICES=\S+ )*(python |accelerate launch |bash runs/|make |sbatch )")
PLACEHOLDER = re.compile(r".*[*\u4e00-\u9fff].*|(.*/)?[A-Z_]+\.yaml")  # RECIPE.yaml, 配方.yaml


def commands(page: str) -> list[str]:
    """Return the commands in code blocks and inline code, with continued lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    indented = re.findall(r"^ {4,}(\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in inline] + indented
    return [line.strip() for line in lines if START.match(line.strip())]


def split(command: str) -> tuple[str | None, list[str]]:
    """Return the script (or `-m` module as its file) of a command and the words after it; no script for `make` etc."""
    words = shlex.split(re.split(r" [|>;] | && ", command)[0].replace("[", " ").replace("]", " "), comments=True)
    if "-m" in words[:3] and words[2].startswith("buddygpt."):
        path = words[2].removeprefix("buddygpt.").replace(".", "/")
        return (f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"), words[3:]
    for number, word in enumerate(words):
        if word.endswith((".py", ".sh")) and "/" in word and not word.startswith("-"):
            return word, words[number + 1 :]
    return None, words


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


def test_the_pages_hold_commands():
    assert len(COMMANDS) > 50 and {"README.md", "README_zh.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_scripts_and_configs_of_a_command_exist(page, command):
    script, _ = split(command)
    assert script is None or (ROOT / script).is_file(), script
    for word in shlex.split(command.replace("[", " ").replace("]", " "), comments=True):
        if re.search(r"\bconfigs/|_configs/", word) and not PLACEHOLDER.fullmatch(word):
            assert (ROOT / word).exists(), word
    if command.startswith("make "):
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert shlex.split(command, comments=True)[1] in targets


def options(script: str) -> set[str]:
    """Return the options in the `--help` of a script."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as end:
        if script.startswith(("check/", "model/")):  # modules, with relative imports
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", [script, "--help"])
                importlib.import_module("buddygpt." + script.removesuffix(".py").replace("/", ".")).main()
        else:
            run(script, "--help")
    assert not end.value.code
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text.getvalue()))


WITH_OPTIONS = [
    (page, script, words)
    for page, command in COMMANDS
    for script, words in [split(command)]
    if script
    and script.endswith(".py")
    and script != "eval/harness.py"
    and any(word.startswith("--") for word in words)
]


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted({script for _, script, _ in WITH_OPTIONS}))
def test_options_of_commands_exist(script):
    known = options(script)
    for page, other, words in WITH_OPTIONS:
        if other == script:
            given = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
            assert given - {"--help"} <= known, page
