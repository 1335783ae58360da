"""Every network against an independent implementation with the same weights."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from torch import nn
from torchvision.models import efficientnet_v2_s
from torchvision.transforms.functional import normalize
from transformers import CLIPTextConfig, CLIPTextModel

from tests.reference import clip_tokenizer, distance, randomise
from wuerstchen_core.models.semantic_compressor import SemanticCompressor
from wuerstchen_core.models.stage_a import VQGAN, StageAConfig
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig

TOLERANCE = 5e-5  # relative, float32

STAGE_B = StageBConfig(
    widths=(32, 64, 64, 128), heads=(0, 2, 1, 4), blocks=(1, 2, 3, 1), condition_width=48, text_width=40
)


@pytest.fixture(scope="module")
def stage_c():
    ours = randomise(Prior(StageCConfig(width=128, depth=3, heads=2, text_width=40)))
    for parameter in ours.out.parameters():
        parameter.mul_(0.1)  # keeps b clear of 1, where the noise (x - a) / |1 - b| has a pole
    theirs = WuerstchenPrior(c_in=16, c=128, c_cond=40, c_r=64, depth=3, nhead=2).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture(scope="module")
def stage_b():
    ours = randomise(DiffNeXt(STAGE_B))
    theirs = WuerstchenDiffNeXt(
        c_hidden=[32, 64, 64, 128], nhead=[-1, 2, 1, 4], blocks=[1, 2, 3, 1], c_cond=48, clip_embd=40
    ).eval()
    weights = ours.state_dict()
    for name in [name for name in weights if name.endswith(".semantic.weight")]:
        first = name.replace("semantic.weight", "channelwise.0.weight")
        weights[first] = torch.cat([weights[first], weights.pop(name)], dim=1)
    theirs.load_state_dict(weights)
    return ours, theirs


@pytest.mark.parametrize("size", [(6, 6), (12, 7)])
@torch.no_grad()
def test_stage_c_is_diffusers(stage_c, size):
    ours, theirs = stage_c
    x, t, text = torch.randn(2, 16, *size), torch.tensor([0.9, 0.013]), torch.randn(2, 77, 40)
    assert distance(ours(x, t, text), theirs(x, t, text)) < TOLERANCE


@pytest.mark.parametrize(
    "latent, semantic", [((32, 32), (3, 3)), ((64, 32), (6, 3)), ((16, 48), (12, 9))], ids=["square", "tall", "coarse"]
)
@torch.no_grad()
def test_stage_b_is_diffusers(stage_b, latent, semantic):
    ours, theirs = stage_b
    x, t = torch.randn(2, 4, *latent), torch.tensor([1.0, 0.4])
    features, text = torch.randn(2, 16, *semantic), torch.randn(2, 77, 40)
    assert distance(ours(x, t, features, text), theirs(x, t, features, text)) < TOLERANCE


@torch.no_grad()
def test_stage_b_without_text_attends_to_the_latent_alone(stage_b):
    """Where it was trained so. Others, as the released one, get 77 zero states."""
    ours, theirs = stage_b
    x, t, features = torch.randn(2, 4, 32, 32), torch.tensor([1.0, 0.4]), torch.randn(2, 16, 3, 3)
    trained_so = deepcopy(ours)
    trained_so.config = replace(ours.config, text_absent=True)
    assert distance(trained_so(x, t, features), theirs(x, t, features, torch.empty(2, 0, 40))) < TOLERANCE
    assert distance(ours(x, t, features), theirs(x, t, features, torch.zeros(2, 77, 40))) < TOLERANCE
    assert distance(ours(x, t, features), trained_so(x, t, features)) > 100 * TOLERANCE


@torch.no_grad()
def test_one_time_for_the_batch_is_that_time_for_each(stage_b, stage_c):
    x, semantic, text = torch.randn(3, 4, 32, 32), torch.randn(3, 16, 3, 3), torch.randn(3, 5, 40)
    b, c = stage_b[0], stage_c[0]
    once = b.denoise(x, b.modulate(torch.tensor([0.3]), torch.float32), b.condition(semantic, text, (32, 32)))
    assert distance(once, b(x, torch.full((3,), 0.3), semantic, text)) < TOLERANCE
    once = c.denoise(semantic, c.modulate(torch.tensor([0.3]), torch.float32), c.condition(text))
    assert distance(once, c(semantic, torch.full((3,), 0.3), text)) < TOLERANCE


@pytest.fixture(scope="module")
def stage_a():
    ours = randomise(VQGAN(StageAConfig(widths=(24, 48), bottleneck_blocks=3, codebook_size=64)))
    theirs = PaellaVQModel(embed_dim=48, bottleneck_blocks=3, num_vq_embeddings=64).eval()
    weights = ours.state_dict()
    weights["vquantizer.embedding.weight"] = weights.pop("vquantizer.codebook.weight")
    theirs.load_state_dict(weights)
    return ours, theirs


@torch.no_grad()
def test_stage_a_is_diffusers(stage_a):
    ours, theirs = stage_a
    image = torch.rand(2, 3, 64, 32)
    latent = ours.encode(image)
    assert latent.shape == (2, 4, 16, 8)
    assert distance(latent, theirs.encode(image).latents / 0.3764) < TOLERANCE
    assert distance(ours.decode(latent), theirs.decode(latent * 0.3764).sample) < TOLERANCE
    quantized, indices = ours.quantize(latent)
    expected, _, (_, _, expected_indices) = theirs.vquantizer(latent * 0.3764)
    assert (indices.flatten() == expected_indices.flatten()).all()
    assert distance(quantized * 0.3764, expected) < TOLERANCE


class Compressor(nn.Module):
    """torchvision's network behind its usual preparation of a picture, and the mapper."""

    def __init__(self):
        super().__init__()
        self.backbone = efficientnet_v2_s().features
        self.mapper = nn.Sequential(nn.Conv2d(1280, 16, 1, bias=False), nn.BatchNorm2d(16))

    def forward(self, image):
        return self.mapper(self.backbone(normalize(image, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])))


@pytest.fixture(scope="module")
def compressor():
    ours, theirs = randomise(SemanticCompressor()), Compressor().eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@torch.no_grad()
def test_semantic_compressor_is_torchvision(compressor):
    ours, theirs = compressor
    image = torch.rand(1, 3, 96, 64)
    assert ours(image).shape == (1, 16, 3, 2)
    assert distance(ours(image), theirs(image)) < TOLERANCE


@pytest.fixture(scope="module")
def text_encoder():
    ours = randomise(TextEncoder(TextEncoderConfig(width=64, layers=2, heads=2)))
    theirs = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu"
        )
    ).eval()
    weights = {
        "embeddings.token_embedding.weight": ours.tower.token_embedding.weight,
        "embeddings.position_embedding.weight": ours.tower.positional_embedding,
        "final_layer_norm.weight": ours.tower.ln_final.weight,
        "final_layer_norm.bias": ours.tower.ln_final.bias,
    }
    for i, block in enumerate(ours.tower.transformer.resblocks):
        to = f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            fused = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            parts = dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), fused, strict=True))
            parts |= {
                "self_attn.out_proj": getattr(block.attn.out_proj, kind),
                "layer_norm1": getattr(block.ln_1, kind),
                "layer_norm2": getattr(block.ln_2, kind),
                "mlp.fc1": getattr(block.mlp.c_fc, kind),
                "mlp.fc2": getattr(block.mlp.c_proj, kind),
            }
            weights |= {f"{to}{part}.{kind}": value for part, value in parts.items()}
    names = theirs.state_dict().keys()
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    theirs.load_state_dict({prefix + name: value for name, value in weights.items()})
    return ours, theirs


@pytest.mark.parametrize("words", [0, 1, 12, 200])
@torch.no_grad()
def test_text_encoder_is_transformers(text_encoder, words):
    """Chunk by chunk: the chunk's own end token is attended to, the padding after it is not."""
    ours, theirs = text_encoder
    prompts = [" ".join(["wurst"] * words), "a cat"]  # "wurst" is one token
    chunks = max(1, -(-words // 75))
    encoded = ours(prompts)
    assert encoded.shape == (2, 77 * chunks, 64)
    for chunk in range(chunks):
        texts = [" ".join(["wurst"] * min(75, words - 75 * chunk)), "a cat" if chunk == 0 else ""]
        ids = [[49406, *ours.tokenizer.encode(text), 49407] for text in texts]
        tokens = torch.tensor([row + [49407] * (77 - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (77 - len(row)) for row in ids])
        expected = theirs(input_ids=tokens, attention_mask=mask).last_hidden_state
        assert distance(encoded[:, 77 * chunk : 77 * (chunk + 1)], expected) < TOLERANCE


@pytest.fixture(scope="module")
def runs(stage_a, stage_b, stage_c, compressor, text_encoder):
    """Name -> our network, the other one, and how to run either in a precision."""
    draw = torch.Generator().manual_seed(1)
    image, picture = torch.rand(1, 3, 64, 32, generator=draw), torch.rand(1, 3, 96, 64, generator=draw)
    latent, semantic = torch.randn(2, 4, 32, 32, generator=draw), torch.randn(2, 16, 6, 6, generator=draw)
    text, t = torch.randn(2, 77, 40, generator=draw), torch.tensor([0.9, 0.4])
    tokens = torch.tensor([[49406, *range(1000, 1040), 49407] + [49407] * 35])

    def hidden_states(network, dtype):
        if isinstance(network, TextEncoder):
            return network.encode_tokens(tokens)
        mask = torch.arange(77)[None] < 42
        return network(input_ids=tokens, attention_mask=mask).last_hidden_state

    def encoded(network, dtype):
        latent = network.encode(image.to(dtype))
        return latent.latents / 0.3764 if isinstance(network, PaellaVQModel) else latent

    def decoded(network, dtype):
        if isinstance(network, PaellaVQModel):
            return network.decode(latent.to(dtype) * 0.3764).sample
        return network.decode(latent.to(dtype))

    return {
        "stage_a, encoding": (*stage_a, encoded),
        "stage_a, decoding": (*stage_a, decoded),
        "stage_b": (*stage_b, lambda net, to: net(latent.to(to), t, semantic.to(to), text.to(to))),
        "stage_c": (*stage_c, lambda net, to: net(semantic.to(to), t, text.to(to))),
        "semantic_compressor": (*compressor, lambda net, to: net(picture.to(to))),
        "text_encoder": (*text_encoder, hidden_states),
    }


def halved(network, dtype):
    """diffusers would round the time too, which the embedding multiplies by 10000; ours keeps it in float32."""
    network = deepcopy(network).to(dtype)
    if hasattr(network, "gen_r_embedding"):
        embed = network.gen_r_embedding
        network.gen_r_embedding = lambda t: embed(t).to(dtype)
    return network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["stage_a, encoding", "stage_a, decoding", "stage_b", "stage_c", "semantic_compressor", "text_encoder"]
)
@torch.no_grad()
def test_half_precision_is_as_near_as_the_other_implementations(runs, name, dtype):
    """A few roundings away from the other one in float64: eps is 2^-7 in bfloat16, 2^-10 in float16."""
    ours, theirs, run = runs[name]
    half, other = (run(halved(network, dtype), dtype) for network in (ours, theirs))
    exact = run(halved(theirs, torch.float64), torch.float64)
    error, others = distance(half, exact), distance(other, exact)
    eps = torch.finfo(dtype).eps
    print(f"{name}: {error / eps:.2f} eps, the other one {others / eps:.2f}")
    assert half.dtype == dtype and half.isfinite().all()
    assert error < min(4 * eps, 1.3 * others)


WORDS = "a lighthouse painted in oils by the sea ; at night , gulls are screaming at wurstchen 猫 🍕 café".split()


@pytest.mark.parametrize("words", [0, 1, 2, 10, 30, 60, 100, 150, 200])
@torch.no_grad()
def test_hidden_states_are_transformers(text_encoder, words):
    """From transformers' own tokens; what is longer than a chunk goes on in the next one from word to word."""
    ours, theirs = text_encoder
    text = (WORDS * 10)[:words]
    chunks, tokenize = [[]], clip_tokenizer()
    for word in text:
        if len(tokenize(" ".join([*chunks[-1], word])).input_ids) > 77:
            chunks.append([])
        chunks[-1].append(word)
    padded = tokenize([" ".join(chunk) for chunk in chunks], padding="max_length", return_tensors="pt")
    assert padded.input_ids.shape == (len(chunks), 77) and (words < 75 or len(chunks) > 1)
    expected = theirs(**padded).last_hidden_state
    assert distance(ours([" ".join(text)]), expected.flatten(0, 1)[None]) < TOLERANCE


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "",
        " two\n\tlines ",
        "A CAT's 3.14 café, naïve!?",
        "猫在屋顶上",
        "🍕👩‍👩‍👧‍👦 :) ;-) #$%^",
        "नमस्ते",
        "x\u200by",
    ],
)
def test_tokens_are_transformers(text_encoder, prompt):
    """Padded with the end token. open_clip's reading also mends web text: ’ becomes ', &amp; becomes &."""
    tokens, weights = text_encoder[0].tokenize([prompt])
    assert tokens[0].tolist() == clip_tokenizer()([prompt], padding="max_length").input_ids
    assert weights.tolist() == [[[1.0] * 77]]
    assert tokens[0, 0, 0] == 49406 and tokens[0, 0, -1] == 49407


@torch.no_grad()
def test_padding_may_be_left_out(text_encoder):
    encoder = text_encoder[0]
    tokens = encoder.tokenize(["a cat", "a small dog"])[0][:, 0]
    seats = torch.tensor([0, 1, 2, 3, 4, 40, 76])
    some = encoder.encode_tokens(tokens[:, seats], seats)
    torch.testing.assert_close(some, encoder.encode_tokens(tokens)[:, seats])


def test_released_sizes():
    """Parameters in millions, as published."""
    h = TextEncoderConfig(width=1024, layers=24, heads=16)
    with torch.device("meta"):
        sizes = {VQGAN(): 18.4, DiffNeXt(): 1055, Prior(): 994, TextEncoder(): 693, TextEncoder(h): 353}
    for network, millions in sizes.items():
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
