"""CLIP score and PickScore of small networks with random weights, against the cosine in float64."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from tests.pictures import picture
from wuerstchen_core import WuerstchenError
from wuerstchen_core.reports.evaluation.text_scores import clip_score, pick_score

CAPTIONS = ["a cat", "a dog " * 60, "a cat"]
PICTURES = [picture(0, (40, 60)), picture(1), picture(2, (224, 200))]
IMAGES = [torch.from_numpy(one).permute(2, 0, 1) / 255 for one in PICTURES]


def cosines(images, texts):
    images, texts = images.double().numpy(), texts.double().numpy()
    return (images * texts).sum(1) / np.linalg.norm(images, axis=1) / np.linalg.norm(texts, axis=1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
    (folder / "tiny-clip.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip").eval()
    torch.save(model.state_dict(), folder / "weights.pt")
    return model, folder / "weights.pt"


def test_the_clip_score_is_the_positive_cosine_times_100(clip, tmp_path):
    model, path = clip
    prepare = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    with torch.inference_mode():
        seen = model.encode_image(torch.stack([prepare(Image.fromarray(one)) for one in PICTURES]))
        read = model.encode_text(open_clip.get_tokenizer("tiny-clip")(CAPTIONS))
    expected = 100 * cosines(seen, read)
    found = clip_score(path, "tiny-clip")(IMAGES, CAPTIONS)
    assert found.numpy() == pytest.approx(expected.clip(min=0), abs=1e-4)
    state = model.state_dict()
    torch.save({**state, "text_projection": -state["text_projection"]}, tmp_path / "turned.pt")
    turned = clip_score(tmp_path / "turned.pt", "tiny-clip")(IMAGES, CAPTIONS)
    assert turned.numpy() == pytest.approx(-expected.clip(max=0), abs=1e-4) and np.abs(expected).min() > 0.1


@pytest.fixture(scope="module")
def pick(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pick")
    letters = [*"acdogt ", *(f"{one}</w>" for one in "acdogt"), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(letters), "eos_token_id": len(letters) - 1, "bos_token_id": len(letters) - 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16)
    ).eval()
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPProcessor(CLIPImageProcessor(**size), tokenizer)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return model, processor, folder


def test_pickscore_is_the_scaled_cosine(pick):
    model, processor, folder = pick
    expected = []
    for pixels, caption in zip(PICTURES, CAPTIONS, strict=True):  # one by one: nothing is padded
        inputs = processor(
            text=caption, images=Image.fromarray(pixels), truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.inference_mode():
            given = model(**inputs)
        scale = model.logit_scale.double().exp().item()
        expected.append(scale * cosines(given.image_embeds, given.text_embeds).item())
    found = pick_score(folder)(IMAGES, CAPTIONS)
    assert found.numpy() == pytest.approx(np.array(expected), abs=1e-4) and np.std(expected) > 1e-3


def test_wrong_or_missing_weights_are_one_clear_line(clip, pick, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    for run, says in (
        (lambda: clip_score(clip[1], "ViT-Z"), "no model of that name"),
        (lambda: clip_score(tmp_path / "none.pt", "tiny-clip"), "there is no such file"),
        (lambda: clip_score(tmp_path / "broken.pt", "tiny-clip"), "not weights of open_clip's tiny-clip"),
        (lambda: clip_score(clip[1], "ViT-S-32-alt"), "not weights of open_clip's ViT-S-32-alt"),
        (lambda: pick_score(tmp_path / "none"), "there is no such folder"),
        (lambda: pick_score(tmp_path), "not PickScore in transformers' layout"),
    ):
        with pytest.raises(WuerstchenError, match=says) as caught:
            run()
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
