"""Files that are replaced whole or not at all, on the disk before they take their place."""

import os
import stat

import pytest
from safetensors.torch import save_file

from wuerstchen_core.util.atomic import remove_partials, replacing


def test_a_file_is_on_the_disk_before_it_takes_its_place_and_its_folder_after(tmp_path, monkeypatch):
    path, before = tmp_path / "a.pt", tmp_path / "a-before.pt"
    path.write_text("old")
    done = []
    sync, replace = os.fsync, os.replace

    def syncing(descriptor):
        done.append(("sync", "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"))
        sync(descriptor)

    def replaced(source, target):
        assert path.exists()
        done.append(("replace", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replaced)
    with replacing(path, keep=before) as partial:
        partial.write_text("new")
    assert done == [("sync", "file"), ("replace", "a-before.pt"), ("replace", "a.pt"), ("sync", "folder")]
    assert (path.read_text(), before.read_text()) == ("new", "old")
    done.clear()
    with replacing(path, sync=False) as partial:
        partial.write_text("newer")
    assert done == [("replace", "a.pt")] and sorted(os.listdir(tmp_path)) == ["a-before.pt", "a.pt"]


def test_a_disk_without_hard_links_keeps_the_file_too(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "a.pt").write_text("old")
    with replacing(tmp_path / "a.pt", keep=tmp_path / "before.pt") as partial:
        partial.write_text("new")
    assert ((tmp_path / "a.pt").read_text(), (tmp_path / "before.pt").read_text()) == ("new", "old")
    assert len(os.listdir(tmp_path)) == 2


def test_an_error_leaves_what_was_there_and_names_the_file(tmp_path):
    path, before = tmp_path / "a.pt", tmp_path / "before.pt"
    path.write_text("old")
    before.write_text("older")
    with pytest.raises(OSError) as told, replacing(path, keep=before) as partial:
        partial.write_text("new")
        raise OSError(28, "No space left on device", str(partial))
    assert told.value.filename == str(path)
    assert (path.read_text(), before.read_text()) == ("old", "older") and len(os.listdir(tmp_path)) == 2
    with pytest.raises(FileNotFoundError) as told, replacing(tmp_path / "gone" / "a.pt"):
        pass
    assert told.value.filename == str(tmp_path / "gone" / "a.pt")


def test_planted_links_are_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in (f".a.pt.{os.getpid()}.partial", "a.pt"):
        (shared / name).symlink_to(precious)
    with replacing(shared / "a.pt") as partial:
        assert stat.S_IMODE(partial.parent.stat().st_mode) == 0o700
        partial.write_text("new")
    assert precious.read_text() == "mine" and (shared / "a.pt").read_text() == "new"
    remove_partials(shared)
    assert precious.read_text() == "mine" and os.listdir(shared) == ["a.pt"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    for name in (".a.pt.x1.partial", ".b.safetensors.y2.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpAb3dEf").write_bytes(b"half")  # as safetensors leaves it
    (tmp_path / "a.partial").write_text("another's")
    remove_partials(tmp_path)
    assert os.listdir(tmp_path) == ["a.partial"]


def test_files_have_the_permissions_of_the_umask(tmp_path):
    import torch

    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.safetensors") as partial:
            save_file({"a": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
