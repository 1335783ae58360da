"""What is kept is found again, and nothing else: not for another picture, caption, weights or batch."""

import pytest
import torch
from PIL import Image

from tests.pictures import picture
from wuerstchen_core import WuerstchenError
from wuerstchen_core.reports.evaluation.kept import Kept, hash_of
from wuerstchen_core.reports.evaluation.reading import score

WEIGHTS = {"features": "f", "clip": "c"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(5):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"caption {number}")
    (folder / "3.png").write_bytes(b"damaged")
    return folder


@pytest.fixture
def measure(folder, tmp_path):
    """() -> what was found, and how many pictures each scorer was given."""

    def measure(weights=WEIGHTS, batch=2, **options):
        seen = dict.fromkeys(WEIGHTS, 0)

        def scorer(name):
            def run(images, captions):
                seen[name] += len(images)
                return torch.stack(
                    [image.mean() * len(caption) for image, caption in zip(images, captions, strict=True)]
                )

            return run

        kept = Kept(tmp_path / "kept" / "here", weights)
        return score(folder, {name: scorer(name) for name in WEIGHTS}, batch, kept=kept, **options), seen

    return measure


def test_nothing_is_measured_twice(measure):
    first, seen = measure()
    assert seen == {"features": 4, "clip": 4}
    again, seen = measure()
    assert seen == {"features": 0, "clip": 0}
    assert (again.keys, again.captions, again.skipped) == (first.keys, first.captions, first.skipped)
    assert again.keys == list("0124") and "3.png" in again.skipped[0]
    assert all(torch.equal(again.values[name], first.values[name]) for name in WEIGHTS)


def test_what_changed_is_measured_again(measure, folder):
    measure()
    status = (folder / "0.png").stat()
    Image.fromarray(picture(9)).save(folder / "0.png")
    assert (folder / "0.png").stat().st_size == status.st_size  # noise isn't compressed
    found, seen = measure()
    assert seen == {"features": 2, "clip": 2}
    assert found.values["features"][0].item() == pytest.approx(picture(9).mean() / 255 * 9, abs=1e-5)
    (folder / "4.txt").write_text("another")
    assert measure()[1] == {"features": 0, "clip": 1}
    assert measure({**WEIGHTS, "features": "g"})[1] == {"features": 4, "clip": 0}
    assert measure(batch=3)[1] == {"features": 4, "clip": 4}
    Image.fromarray(picture(3)).save(folder / "3.png")
    assert measure()[1] == {"features": 2, "clip": 2}


def test_prompts_count_as_captions(measure, folder):
    Image.fromarray(picture(3)).save(folder / "3.png")
    measure(prompts=list("abcde"))
    assert measure(prompts=list("abcdE"))[1] == {"features": 0, "clip": 1}


def test_an_interrupted_run_goes_on(measure, tmp_path):
    measure(limit=2)
    assert measure()[1] == {"features": 2, "clip": 2}
    for file in (tmp_path / "kept" / "here").iterdir():
        file.write_bytes(file.read_bytes()[:50])  # of a disk that was full
    assert measure()[1] == {"features": 4, "clip": 4}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WuerstchenError, match="file/kept: nothing can be kept there"):
        Kept(tmp_path / "file" / "kept", WEIGHTS)


def test_the_hash_of_a_folder_changes_with_names_and_contents(tmp_path):
    hashes = set()
    for name, content in (("a", b"1"), ("a", b"2"), ("b", b"2")):
        (tmp_path / name).write_bytes(content)
        hashes.add(hash_of(tmp_path))
    assert len(hashes) == 3
