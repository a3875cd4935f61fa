"""Files and folders that are whole or absent, among links and manifests of strangers."""

import json
import os

import pytest

from formats import whole


@pytest.fixture
def folder(tmp_path):
    whole.commit(tmp_path / "a", lambda tmp: whole.write_file(tmp / "x.json", {"é": 1}))
    assert whole.whole(tmp_path / "a") is None and json.loads((tmp_path / "a" / "x.json").read_text()) == {"é": 1}
    return tmp_path / "a"


@pytest.mark.parametrize("name", ["/dev/zero", "zero", "../outside", "sub/outside", "pipe"])
def test_only_files_of_the_folder_are_hashed(folder, name):
    """/dev/zero has no end, and a pipe never answers."""
    (folder.parent / "outside").write_text("x")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "sub").symlink_to("..")
    os.mkfifo(folder / "pipe")
    (folder / whole.MANIFEST).write_text(json.dumps({name: "0" * 64}, indent=1))
    assert whole.whole(folder) == f"{folder / name} is damaged"
    (folder / whole.MANIFEST).unlink()
    (folder / whole.MANIFEST).symlink_to("/dev/zero")
    assert "cannot be read" in whole.whole(folder)


def test_nothing_is_written_through_a_link(folder, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".tmp-b.json", "b.json"):
        (tmp_path / name).symlink_to(victim)
    whole.write_file(tmp_path / "b.json", "text")
    assert (tmp_path / "b.json").read_text() == "text" and not (tmp_path / "b.json").is_symlink()
    (tmp_path / "other").mkdir()
    (tmp_path / ".tmp-a").symlink_to(tmp_path / "other")
    whole.commit(tmp_path / "a", lambda tmp: whole.write_file(tmp / "y", "y"))
    assert not list((tmp_path / "other").iterdir()) and victim.read_text() == "precious"
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"y", whole.MANIFEST}
