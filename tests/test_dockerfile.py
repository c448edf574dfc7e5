"""The Dockerfile: what it copies exists, what it runs is there, and nothing large or private gets into the image."""

import json
import re
import shlex

from conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if re.match("[A-Z]+ ", line)]


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in LINES if name == instruction]


def test_copied_paths_exist():
    for line in arguments("COPY"):
        *sources, _ = shlex.split(line)
        assert all((ROOT / source).exists() for source in sources), line


def test_it_starts_from_a_python_that_the_project_supports():
    assert LINES[0] == ["ARG", "BASE=python:3.11-slim"] and arguments("FROM") == ["${BASE}"]
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_variable_is_an_argument_with_a_default():
    given = dict(line.split("=", 1) for line in arguments("ARG"))
    assert given["TORCH_INDEX"].endswith("/cpu")  # CUDA only on request
    assert set(re.findall(r"\$\{(\w+)\}", DOCKERFILE)) == given.keys()


def test_the_targets_exist_and_the_pin_of_torch_is_found():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (command,) = arguments("CMD")
    for target in (*re.findall(r"\bmake (\w+)$", "\n".join(arguments("RUN")), re.MULTILINE), json.loads(command)[1]):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert len(re.findall(r"^torch==\S+$", requirements, re.MULTILINE)) == 1
    assert requirements.rstrip().endswith("\n-e .")  # left out of the layer of packages


def test_the_image_holds_nothing_that_git_ignores():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in (ROOT / ".gitignore").read_text(encoding="utf-8").split():
        assert {name.rstrip("/"), f"**/{name.rstrip('/')}"} & set(ignored), name
    assert ".git" in ignored
