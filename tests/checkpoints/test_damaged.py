"""2,000 damaged files, a hundred of them in the default run.

Each is the network, one that differs in its values, or one error, at once and in little memory. What could make this
pass though it should not: damage that changes nothing (told apart by the share of errors), a network that loads and
cannot be used (so it is used), time and memory that nobody measures.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import wuerstchen_core as w
from tests.checkpoints.damaged import CATEGORIES, Damage
from tests.checkpoints.small import LORA, networks, use
from wuerstchen_core.checkpoints.load import load_network

EACH, ALL = 5, 96  # of every category; 21 categories
SECONDS, BYTES = 2.0, 1 << 30
SHOULD_FAIL = {"header_length", "offsets", "duplicate_keys", "raw_pickles", "code", "not_finite"}


def resident(field: str) -> int:
    """Bytes, of the fields of Linux's /proc/self/status; the peak is counted from the last `clear_refs`."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def outcome(path: Path, kind: str) -> str:
    """`refused`, `loaded`, or what is wrong with how it ended."""
    Path("/proc/self/clear_refs").write_text("5")
    start, before = time.process_time(), resident("VmRSS")
    try:
        use(kind, w.load_lora(path) if kind == LORA else load_network(kind, path))
        result = "loaded"
    except w.WuerstchenError as error:
        text = str(error)
        fine = 0 < len(text) < 500 and text.isprintable()
        result = "refused" if fine else f"a message of {len(text)} letters: {text!r:.300}"
    except BaseException as error:  # a KeyboardInterrupt is the one thing that may end it
        if isinstance(error, KeyboardInterrupt):
            raise
        result = f"{type(error).__name__}: {error!s:.300}"
    grown = resident("VmHWM") - before
    seconds = time.process_time() - start
    if seconds > SECONDS:
        result = f"{seconds:.1f} s ({result})"
    return result if grown < BYTES else f"{grown >> 20} MB ({result})"


def tell(category: str, count: int, folder: Path, seed: int) -> tuple[int, list[str]]:
    """How many of the files were refused, and what went wrong."""
    damage, wrong, refused = Damage(folder, seed), [], 0
    for number in range(count):
        path, kind = damage.make(category)
        result = outcome(path, kind)
        refused += result == "refused"
        if result not in ("refused", "loaded"):
            wrong.append(f"{category} {number}, {kind}: {result}")
        if path.is_relative_to(folder) and os.path.isfile(path):
            path.unlink()
    return refused, wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the whole networks in it; what the first load brings with it, such as modules, is there."""
    folder = tmp_path_factory.mktemp("damaged")
    Damage(folder, 0)
    for kind in networks():
        use(kind, load_network(kind, folder / "whole" / f"{kind}.safetensors"))
    use(LORA, w.load_lora(folder / "whole" / "lora.safetensors"))
    return folder


needs_peak = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of memory")


@needs_peak
@pytest.mark.parametrize("category", CATEGORIES)
def test_a_damaged_file_harms_nothing(folder, category):
    refused, wrong = tell(category, EACH, folder, seed=1)
    assert not wrong
    assert refused == EACH or category not in SHOULD_FAIL
    assert not (folder / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("category", CATEGORIES)
def test_two_thousand_damaged_files_harm_nothing(tmp_path, category):
    """In a process of its own, which ends after a minute of computing."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.test_damaged", category, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    print(child.stdout)
    assert child.returncode == 0, child.stdout + child.stderr[-2000:]


def main(category: str, folder: str) -> int:
    import resource

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
    limit = 8 << 30  # of addresses, of which importing torch takes most
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    Damage(Path(folder), 0)
    for kind in networks():
        use(kind, load_network(kind, Path(folder) / "whole" / f"{kind}.safetensors"))
    refused, wrong = tell(category, ALL, Path(folder), seed=2)
    print(f"{category}: {refused} of {ALL} refused", *wrong, sep="\n")
    return bool(wrong) or (Path(folder) / "ran").exists()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
