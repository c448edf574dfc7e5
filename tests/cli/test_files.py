"""Files that users name: each is read, or named and counted as skipped."""

import pytest

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import ROW_TYPES, find_files


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def found(folder, *options):
    return [path.relative_to(folder).as_posix() for path in find_files([str(folder)], *options)]


def test_a_folder_is_read_and_what_is_skipped_is_counted_by_type(tmp_path, capsys):
    folder = fill(
        tmp_path, "a.txt", "b/c.md", "b/README.md", "z.zip", "y/f.feather", "y/g.feather", ".git/h.md", "LICENSE"
    )
    assert found(folder) == ["a.txt", "b/README.md", "b/c.md"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"skipped 4 of 7 files in {folder}, which are not read here: "
        "1 without a suffix (LICENSE), 2 .feather (y/f.feather), 1 .zip (z.zip)"
    )
    found(folder)
    assert capsys.readouterr().err == ""  # once is enough


def test_the_description_of_a_data_set_is_no_data(tmp_path, capsys):
    folder = fill(tmp_path, "README.md", "data/a.parquet", "data/notes.md")
    assert found(folder) == ["data/a.parquet", "data/notes.md"]
    assert "1 README.md (README.md)" in capsys.readouterr().err
    assert found(folder, ROW_TYPES) == ["data/a.parquet"]
    assert "1 README.md (README.md), 1 .md (data/notes.md)" in capsys.readouterr().err


def test_a_folder_without_anything_to_read_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match=r"no file matches `.*`: it holds 2 \.bz2 \(a\.jsonl\.bz2\); use \.jsonl, "):
        find_files([str(fill(tmp_path, "a.jsonl.bz2", "b.txt.bz2"))])
    with pytest.raises(UserError, match="no file matches"):
        find_files([str(tmp_path / "none")])


def test_names_in_capitals_or_with_brackets_are_found(tmp_path):
    folder = fill(tmp_path, "A.JSONL", "B.Csv.GZ", "c[1].jsonl", "c1.jsonl", "d[1]/e.txt")
    assert found(folder) == ["A.JSONL", "B.Csv.GZ", "c1.jsonl", "c[1].jsonl", "d[1]/e.txt"]
    assert find_files([f"{folder}/c[1].jsonl", f"{folder}/d[1]"]) == [folder / "c[1].jsonl", folder / "d[1]" / "e.txt"]
    assert find_files([f"{folder}/c[0-9].jsonl"]) == [folder / "c1.jsonl"]
