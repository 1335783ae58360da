"""A folder to train Stages B and C in; the LoRAs' networks."""

import numpy as np
import pytest
from PIL import Image

from tests.loras import stage_c, theirs  # noqa: F401, fixtures
from wuerstchen_core.checkpoints.sets import SET

TINY_C = """
folder = "run"
data = "pictures"
size = 64
batch = 4
workers = 0
buckets = false
steps = 8
warm_up = 3
learning_rate = 1e-3
save_every = 4
sample_every = 0
log_every = 1
ema_every = 2

[network]
width = 32
depth = 1
heads = 2
text_width = 32
dropout = 0.0
"""
TINY_B = """
folder = "run"
data = "pictures"
size = 64
batch = 2
workers = 0
steps = 3
warm_up = 3
save_every = 3
sample_every = 3
sample_count = 2
sample_steps = 2
log_every = 1
ema_every = 1
text_absent = 0.5

[network]
widths = [16, 32, 32, 32]
heads = [0, 2, 2, 2]
blocks = [1, 1, 1, 1]
condition_width = 24
text_width = 32
dropout = 0.0

[compressor]
stem = 8
stages = [[true, 1, 2, 8, 1], [true, 1, 2, 8, 1], [true, 1, 2, 8, 1], [true, 1, 2, 8, 1]]
features = 16
"""


@pytest.fixture
def place(tmp_path, tiny_folder, monkeypatch):
    """The present folder: pictures, configurations, and the tiny set as the weights."""
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        size = [(64, 64), (64, 128), (128, 64)][number % 3]
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"pictures/{number:02}.png")
        (tmp_path / f"pictures/{number:02}.txt").write_text(f"number {number} (grey)")
    names = {role: (tiny_folder / name).as_posix() for role, name in SET.items()}
    encoder, compressor = f'text_encoder = "{names["text_encoder_c"]}"\n', names["semantic_compressor"]
    frozen = encoder + f'semantic_compressor = "{compressor}"\nstage_a = "{names["stage_a"]}"\n'
    (tmp_path / "c.toml").write_text(frozen + f'stage_b = "{names["stage_b"]}"\n' + TINY_C)
    (tmp_path / "b.toml").write_text(frozen + TINY_B)
    monkeypatch.chdir(tmp_path)
    return tmp_path
