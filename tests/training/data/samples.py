"""Folders and shards of pictures, and batches of them."""

import io
import tarfile
from itertools import islice

import torch

from tests.pictures import encoded, picture
from wuerstchen_core.training.data.batches import open_batches

SHAPES = [(64, 64), (40, 60), (60, 40), (30, 70), (50, 48)]  # (height, width)


def write_folder(folder, count, shapes=SHAPES):
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:02}.png").write_bytes(encoded(picture(number, shapes[number % len(shapes)])))
        (folder / f"{number:02}.txt").write_text(f"picture {number}")
    return folder


def write_shard(path, files):
    """files: (name, content) in order"""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples_of(numbers, shapes=SHAPES):
    for number in numbers:
        yield f"{number:02}.png", encoded(picture(number, shapes[number % len(shapes)]))
        yield f"{number:02}.txt", f"picture {number}".encode()


def take(count, *arguments, **options):
    batches = open_batches(*arguments, **options)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items())


def all_same(ones, others):
    return len(ones) == len(others) and all(map(same, ones, others))
