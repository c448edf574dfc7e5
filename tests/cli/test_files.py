"""Files that users name: each is read, or named and counted as skipped."""

import pytest

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import ROW_TYPES, find_files, write_atomically


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


@pytest.mark.parametrize("fails", [False, True])
def test_writing_touches_no_folder_of_the_user_and_leaves_nothing_behind(tmp_path, fails):
    fill(tmp_path, "out/old", "out.partial/notes", ".out.partial/notes")
    before = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    try:
        with write_atomically(tmp_path / "out") as partial:
            fill(partial, "new")
            assert (tmp_path / "out" / "old").exists()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    after = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert after == (before if fails else before - {"out/old"} | {"out/new"})


def test_what_a_link_names_is_replaced_and_the_link_stays(tmp_path):
    fill(tmp_path, "disk/old")
    (tmp_path / "out").symlink_to("disk")
    with write_atomically(tmp_path / "out") as partial:
        fill(partial, "file")
    assert (tmp_path / "out").is_symlink() and [*(tmp_path / "disk").iterdir()] == [tmp_path / "disk/file"]


def test_an_output_of_another_kind_or_a_link_to_nothing_stays_as_it_is(tmp_path):
    fill(tmp_path, "file", "folder/old")
    (tmp_path / "link").symlink_to("nothing")
    for name, made, message in [
        ("file", "new/file", "file is a file; name a folder"),
        ("folder", "", "folder is a folder; name a file"),
        ("link", "", "link is a link to nothing, which does not exist; make that, or name another"),
        ("link/below", "", "link is a link to nothing, which does not exist"),
    ]:
        with pytest.raises(UserError, match=message), write_atomically(tmp_path / name) as partial:
            fill(partial, made) if made else partial.write_text("new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "link", "old"]
    assert (tmp_path / "file").read_text() == "x"


def test_a_file_is_replaced_as_a_whole(tmp_path):
    for text in ("first", "second"):
        with write_atomically(tmp_path / "new" / "file.txt") as partial:
            partial.write_text(text)
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.txt"]
        assert (tmp_path / "new" / "file.txt").read_text() == text


def test_what_a_killed_process_left_is_deleted(tmp_path):
    fill(tmp_path, ".out.1073741824.x1y2.partial/out/half", ".out.mine.partial/notes")
    with write_atomically(tmp_path / "out") as partial:
        partial.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.mine.partial", "out"]
