"""Features against torch-fidelity's own network, and pictures resized as Pillow does, without rounding."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

import wuerstchen_core as w
from wuerstchen_core import WuerstchenError
from wuerstchen_core.checkpoints.sets import MINI, SET
from wuerstchen_core.reports.evaluation.extractors import (
    InceptionFeatures,
    load_compressor_features,
    load_inception,
    resized,
)


def test_pictures_are_resized_by_pillows_bicubic_without_rounding():
    image = np.random.default_rng(0).random((3, 90, 51), dtype=np.float32)
    expected = [
        np.asarray(Image.fromarray(channel).resize((32, 32), Image.Resampling.BICUBIC)).clip(0, 1) for channel in image
    ]
    assert np.abs(resized(torch.from_numpy(image), 32).numpy() - np.stack(expected)).max() < 2e-6


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with torch-fidelity's names, filled with random values that keep activations near 1."""
    torch.manual_seed(0)
    state = {}
    for name, value in InceptionFeatures().state_dict().items():
        value = torch.rand_like(value) + 0.5 if "bn." in name and value.is_floating_point() else value
        state[name.removeprefix("layers.")] = value
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, path)
    return path


def test_inception_is_torch_fidelitys(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(weights)).eval()
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours = load_inception(weights)
    with torch.inference_mode():
        features, logits = theirs(images)
    found = ours.score(list(images.float() / 255), ["", ""])
    assert found.shape == (2, ours.num_features) and found.std() > 1e-3
    assert (found - features).abs().max() < 1e-4 * features.abs().max()
    assert (ours.logits(found) - logits).abs().max() < 1e-4 * logits.abs().max()
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in ours.about and ours.comparable


def test_other_weights_are_one_clear_line(weights, tmp_path):
    state = torch.load(weights)
    del state["Mixed_6c.branch1x1.conv.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(WuerstchenError, match="Mixed_6c.branch1x1.conv.weight is missing .* --inception takes"):
        load_inception(tmp_path / "cut.pth")
    with pytest.raises(WuerstchenError, match="Conv2d_1a_3x3"):
        load_inception(MINI / SET["stage_a"])
    with pytest.raises(WuerstchenError, match="none.pth"):
        load_inception(tmp_path / "none.pth")


def test_the_compressors_features_are_its_backbones_mean():
    extractor = load_compressor_features()
    compressor = w.load_semantic_compressor(MINI / SET["semantic_compressor"])
    seen = []
    compressor.backbone.register_forward_hook(lambda *call: seen.append(call[2]))
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        compressor(image)
    found = extractor.score([image[0]], [""])
    assert found.shape == (1, 384) and torch.allclose(found, seen[0].mean(dim=(2, 3)), atol=1e-6)
    assert "not comparable with papers" in extractor.about and extractor.logits(found) is None
