"""Files that are no LoRA, or another model's."""

import pytest
import torch
from safetensors.torch import save_file

import wuerstchen_core as w
from tests.loras import bits, outputs, pair, same_bits

BAD = {
    "a network": ({"projection.weight": torch.ones(4, 2, 1, 1)}, "not a LoRA (the names of its tensors begin with"),
    "of SDXL": (
        pair("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        "another model: Stage C has nothing to change in down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "of a text encoder": (
        pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
        "a LoRA of text encoders alone: it changes nothing in Stage C",
    ),
    "of a 3x3 convolution": (pair("blocks.0.depthwise"), "a half of blocks.0.depthwise has the shape 2×32"),
    "half": ({"blocks.2.attention.to_q.lora_A.weight": torch.ones(2, 32)}, "blocks.2.attention.to_q has no up half"),
    "two ranks": (pair(lora_B=torch.ones(32, 3)), "of ranks 2 and 3"),
    "no matrix": (pair(lora_A=torch.ones(2, 32, 3, 3)), "shape 2×32×3×3"),
    "a vector": (pair(lora_A=torch.ones(2)), "shape 2 and is no matrix"),
    "empty": (pair(lora_A=torch.ones(0, 32), lora_B=torch.ones(32, 0)), "shape 0×32"),
    "NaN": (pair(lora_B=torch.full((32, 2), torch.nan)), "to_q.lora_B.weight is not finite"),
    "infinite": (pair(lora_A=torch.full((2, 32), torch.inf)), "to_q.lora_A.weight is not finite"),
    "integers": (pair(lora_A=torch.ones(2, 32, dtype=torch.int8)), "to_q.lora_A.weight holds whole numbers"),
    "NaN alpha": (pair() | {"blocks.2.attention.to_q.alpha": torch.tensor(torch.nan)}, "alpha is not finite"),
    "alpha of two": (pair() | {"blocks.2.attention.to_q.alpha": torch.ones(2)}, "alpha is no number"),
    "DoRA": (
        pair() | {"blocks.2.attention.to_q.lora_magnitude_vector": torch.ones(32)},
        "it holds blocks.2.attention.to_q.lora_magnitude_vector: a LoRA of another kind",
    ),
    "bias": (pair() | {"blocks.2.attention.to_q.lora_B.bias": torch.ones(32)}, "lora_B.bias: a LoRA of another kind"),
    "two adapters": (pair() | {f"prior.{name}": tensor for name, tensor in pair().items()}, "to_q twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_in_one_line(tmp_path, case):
    tensors, says = BAD[case]
    path = tmp_path / "bad.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(w.WuerstchenError) as caught:
        w.load_lora(path)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata, says",
    [
        ("{", "not a configuration"),
        ("[1]", "not a configuration"),
        ('{"lora_alpha": "much"}', "lora_alpha is no number"),
        ('{"lora_alpha": [1]}', "lora_alpha is no number"),
        ('{"lora_alpha": NaN}', "lora_alpha is nan"),
        ('{"prior.alpha_pattern": {"(": 1}}', "alpha_pattern"),
        ('{"alpha_pattern": 3}', "alpha_pattern"),
        ('{"prior.use_dora": true}', "not supported (use_dora)"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path, metadata, says):
    path = tmp_path / "bad.safetensors"
    save_file(pair(), path, {"lora_adapter_metadata": metadata})
    with pytest.raises(w.WuerstchenError) as caught:
        w.load_lora(path)
    assert "bad.safetensors" in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize(
    "tensors, says",
    [
        (pair(lora_A=torch.ones(2, 48)), "to_q of 32×48, which in this one, of width 32, is 32×32"),
        (pair("blocks.8.attention.to_q"), "blocks.8.attention.to_q, which this one, of depth 2, has not"),
        (pair("blocks.1.attention.to_q"), "blocks.1.attention.to_q, which this one"),
        (pair("projection"), "projection of 32×32, which in this one, of width 32, is 32×16"),
    ],
)
def test_a_lora_of_another_stage_c_is_named_by_its_first_module_and_changes_nothing(stage_c, tmp_path, tensors, says):
    save_file(tensors, tmp_path / "other.safetensors")
    other, before = w.load_lora(tmp_path / "other.safetensors"), bits(stage_c)
    save_file(pair(), tmp_path / "good.safetensors")
    good = w.load_lora(tmp_path / "good.safetensors")
    with pytest.raises(w.WuerstchenError, match="other.safetensors") as caught:
        outputs(stage_c, (good, 1.0), (other, 1.0))
    assert says in str(caught.value) and same_bits(stage_c, before)
    with pytest.raises(w.WuerstchenError, match="strength is nan"):
        outputs(stage_c, (good, float("nan")))
    assert same_bits(stage_c, before)


def test_a_lora_in_the_place_of_a_network_is_sent_to_its_loader(tmp_path):
    save_file(pair(), tmp_path / "style.safetensors")
    with pytest.raises(w.WuerstchenError, match="this is a LoRA.*load_lora.*expected a stage_c"):
        w.load_stage_c(tmp_path / "style.safetensors")


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a.lora_A.weight": Code()}, tmp_path / "code.bin")
    with pytest.raises(w.WuerstchenError, match="none of it was run"):
        w.load_lora(tmp_path / "code.bin")
    assert not (tmp_path / "ran").exists()
