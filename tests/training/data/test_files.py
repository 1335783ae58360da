"""What is data in a folder or a shard, and what would block, loop or fill the memory."""

import os
import re
import signal
import tarfile
import tracemalloc
import zlib

import pytest
import torch

from tests.pictures import encoded, picture
from tests.training.data.samples import samples_of, take, write_folder, write_shard
from wuerstchen_core import WuerstchenError
from wuerstchen_core.training.data import shards as shards_module
from wuerstchen_core.training.data.batches import open_batches
from wuerstchen_core.training.data.feature_cache import FeatureCache, fingerprint
from wuerstchen_core.training.data.files import is_leftover
from wuerstchen_core.training.data.sources import FolderSource
from wuerstchen_core.util.errors import readable

PNG = encoded(picture(0))

LEFTOVERS = (
    ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "__macosx/x/a.png", "._a.png", ".hidden/deep/a.png", "@eaDir/a.png",
    "$RECYCLE.BIN/a.png", "System Volume Information/a.png", "sub/.thumbnails/a.png", "#recycle/a.png",
)  # fmt: skip


@pytest.fixture
def impatient():
    """What would block for ever is an error after 20 s."""

    def give_up(*arguments):
        raise AssertionError("it blocks")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_what_tools_leave_behind_is_no_data(tmp_path):
    kept = {"a.png", "data.v1/b.png", "a..b/c.png", "__init__/d.png", "Thumbs.db.png"}
    folder = tmp_path / ".cache" / "pictures"  # which may be hidden itself
    for path in (*kept, *LEFTOVERS, "Thumbs.db", "desktop.ini"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(PNG)
    assert set(FolderSource(folder).keys) == kept
    files = [(path, PNG) for path in (*LEFTOVERS, "./good/a.png", "./good/._b.png")]
    assert {batch["key"][0] for batch in take(4, write_shard(tmp_path / "x.tar", files), 64, 1)} == {
        f"{tmp_path}/x.tar/./good/a"
    }
    assert not is_leftover("../pictures/./a.png") and is_leftover("a\\.git\\b.png")


def test_linked_folders_are_followed_once(tmp_path, caplog):
    pictures, other = write_folder(tmp_path / "pictures", 2), write_folder(tmp_path / "other", 3)
    (pictures / "sub").mkdir()
    (pictures / "sub" / "x.png").write_bytes(PNG)
    links = {"a_link": pictures / "sub", "up": pictures, "sub/up": pictures, "self": pictures / "self", "more": other}
    links |= {"more_again": other, "z.png": other / "02.png", "gone": tmp_path / "no"}
    for name, target in links.items():
        (pictures / name).symlink_to(target)
    assert FolderSource(pictures).keys == [
        "00.png", "01.png", "more/00.png", "more/01.png", "more/02.png", "sub/x.png", "z.png"
    ]  # fmt: skip
    batches = take(7, pictures, 64, 1, buckets=False)
    captions = {batch["key"][0]: batch["caption"][0] for batch in batches}
    assert captions["more/01.png"] == "picture 1" and captions["z.png"] == ""
    assert not any("skipped" in message for message in caplog.messages)


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root reads every folder")
def test_a_folder_that_can_not_be_read_is_named(tmp_path, caplog):
    folder = write_folder(tmp_path / "pictures", 2)
    write_folder(folder / "closed", 2).chmod(0)
    try:
        assert FolderSource(folder).keys == ["00.png", "01.png"]
        assert "skipped the folder closed: Permission denied" in caplog.text
        with pytest.raises(WuerstchenError, match="closed: the folder can't be read"):
            FolderSource(folder / "closed")
    finally:
        (folder / "closed").chmod(0o700)


@pytest.mark.parametrize("name, says", [("00.png", "not a regular file"), ("00.txt", "not a regular file")])
def test_a_named_pipe_in_a_folder_makes_a_bad_sample(tmp_path, name, says, impatient, caplog):
    folder = write_folder(tmp_path / "pictures", 2)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    batches = take(4, folder, 64, 2)
    assert all(batch["key"] == ["01.png", "01.png"] and batch["skipped"] == 1 for batch in batches)
    assert caplog.messages == [f"skipped 00.png: it is {says}"]


def test_named_pipes_and_devices_block_nothing(tmp_path, impatient, caplog):
    folder = write_folder(tmp_path / "pictures", 2)
    os.mkfifo(folder / "metadata.jsonl")
    (folder / "01.txt").unlink()
    (folder / "01.txt").symlink_to("/dev/zero")
    assert {batch["key"][0] for batch in take(4, folder, 64, 1)} == {"00.png"}
    assert "metadata.jsonl: 1 row can't be used; after 0 rows: it is not a regular file" in caplog.text
    os.mkfifo(tmp_path / "0.tar")
    write_shard(tmp_path / "1.tar", samples_of([1]))
    caplog.clear()
    take(2, str(tmp_path / "{0..1}.tar"), 64, 1)
    assert f"{tmp_path}/0.tar: the shard can't be read to its end (it is not a regular file)" in caplog.text
    cache = FeatureCache(tmp_path / "cache", "weights")
    cache.write(["ab" * 32], {"a": torch.zeros(1, 2)})
    (path,) = cache.folder.rglob("*.safetensors")
    path.unlink()
    os.mkfifo(path)
    assert cache.find("ab" * 32) is None
    with pytest.raises(WuerstchenError, match="cannot be read .it is not a regular file"):
        fingerprint(path)


@pytest.mark.parametrize("data", ["", " ", "\n"])
def test_no_name_is_not_the_present_folder(data, tmp_path, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path / "pictures", 1))
    with pytest.raises(WuerstchenError, match="there is no such folder"):
        open_batches(data, 64, 1)


def test_messages_are_of_one_short_line_without_control_characters():
    told = readable("a\n\tb\x1b]52;c\x07" + "\u202e\udcff" + "x" * 10**6)
    assert len(told) == 300 and told.startswith(r"a b\x1b]52;c\x07\u202e\udcffxxx") and told.isprintable()
    assert readable("café 猫") == "café 猫"


# Archives that would fill the memory


def member(name, size, kind=tarfile.REGTYPE):
    header = tarfile.TarInfo(name)
    header.size, header.type = size, kind
    return header.tobuf(tarfile.GNU_FORMAT)


def zeros_in_gzip(header, size, rest):
    """A .tgz of a header with so many zeros behind it, compressed, then the rest of an archive."""
    compressor = zlib.compressobj(1, wbits=31)
    part, parts = bytes(1 << 20), [compressor.compress(header)]
    parts += [compressor.compress(part) for _ in range(size >> 20)]
    return b"".join([*parts, compressor.compress(rest), compressor.flush()])


@pytest.mark.parametrize(
    "name, kind, says",
    [
        ("bomb.png", tarfile.REGTYPE, r"skipped .*x.tgz/bomb: .png has 16777216 bytes, more than 2097152"),
        ("bomb.txt", tarfile.REGTYPE, r"skipped .*x.tgz/bomb: .txt has 16777216 bytes, more than 1048576"),
        ("bomb", tarfile.XHDTYPE, r"can't be read to its end \(it has a header of 16777216 bytes\)"),
        ("bomb", tarfile.GNUTYPE_LONGNAME, r"can't be read to its end \(it has a header of 16777216 bytes\)"),
        ("bomb", tarfile.XGLTYPE, r"can't be read to its end \(it has a header of 16777216 bytes\)"),
    ],
)
def test_a_huge_file_in_a_shard_is_named_and_never_in_memory(tmp_path, name, kind, says, caplog, monkeypatch):
    monkeypatch.setattr(shards_module, "LARGEST_PICTURE", 2 << 20)
    good = write_shard(tmp_path / "good.tar", samples_of([0]))
    (tmp_path / "x.tgz").write_bytes(zeros_in_gzip(member(name, 16 << 20, kind), 16 << 20, good.read_bytes()))
    tracemalloc.start()
    try:
        batches = take(3, [str(good), str(tmp_path / "x.tgz")], 64, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert {batch["caption"][0] for batch in batches} == {"picture 0"} and peak < 10 << 20
    assert any(re.search(says, message) for message in caplog.messages)
