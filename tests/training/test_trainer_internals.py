"""The private members of trainers that the project relies on still exist, and all are listed."""

import re

import pytest
from conftest import ROOT
from transformers import Trainer

from buddygpt.training.trainer_internals import missing_internals, read_table

FOLDERS = ("training", "pretrain", "sft", "rlhf")


@pytest.mark.slow
def test_every_member_exists_in_the_installed_versions():
    gone = [f"{each.owner}.{each.name}, used in {each.file}: {each.why}" for each in missing_internals()]
    assert not gone, "this transformers or TRL lacks members that the project relies on:\n" + "\n".join(gone)


def test_every_private_member_in_use_is_listed():
    listed = {(each.file, each.name) for each in read_table()}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            file, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
            used = set(re.findall(r"(?:trainer|super\(\))\.(_[a-z]\w+)", text))
            overridden = {name for name in re.findall(r"    def (_[a-z]\w+)", text) if hasattr(Trainer, name)}
            unlisted = {name for name in used | overridden if (file, name) not in listed}
            assert not unlisted, f"{file} uses {unlisted}: add them to training/trainer_internals.py"


def test_the_list_names_files_that_use_the_members():
    for each in read_table():
        assert each.name in (ROOT / each.file).read_text(encoding="utf-8"), f"{each.file} does not use {each.name}"
