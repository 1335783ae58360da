"""Guidance nodes, caches and compilation on Stage C."""

import pytest
import torch

from tests.comfyui.host import apart, noise

NODES = {
    "RescaleCFG": {"multiplier": 0.7},
    "CFGZeroStar": {},
    "CFGNorm": {"strength": 1.0},
    "APG": {"eta": 1.0, "norm_threshold": 5.0, "momentum": 0.0},
    "Mahiro": {},
    "TCFG": {},
    "FreSca": {"scale_low": 1.0, "scale_high": 1.25, "freq_cutoff": 1},
    "Epsilon Scaling": {"scaling_factor": 1.02},
    "PerturbedAttentionGuidance": {"scale": 2.0},
}


@pytest.mark.parametrize("node", NODES)
def test_guidance_nodes_have_their_effect(call, run, tinies, text, ksampler, empty, node):
    """In KSampler and in our own sampler alike."""
    model = call(node, model=tinies.model_c, **NODES[node])
    options = {"cfg": 5.0}

    def ours(model):
        return run("WuerstchenStageCSampler", model=model, positive=text("a cat"), negative=text(""), latent=empty(),
                   seed=1, steps=4, sampler="ddim", schedule="even", denoise=1.0, **options)  # fmt: skip

    for sample in (lambda model: ksampler(empty(), model, **options), ours):
        plain, guided = sample(tinies.model_c), sample(model)
        assert guided["samples"].isfinite().all() and apart(guided, plain) > 1e-4


def test_perturbed_attention_is_of_the_middle_block_alone(call, module, tinies):
    network = tinies.model_c.model.diffusion_model
    seen = []

    def values(q, k, v, options):
        seen.append((q.shape, options["n_heads"]))
        return v

    patches = {"patches_replace": {"attn1": {("middle", 0): values}}}
    with torch.inference_mode():
        condition = network.condition(noise(1, 7, 32))
        x, t = noise(1, 16, 3, 5), torch.tensor([0.5])
        perturbed = network(x, t, condition=condition, transformer_options=patches)
        plain = network(x, t, condition=condition)
        again = network(x, t, condition=condition)
    assert seen == [((1, 15, 32), 2)]
    assert torch.equal(plain, again) and not torch.allclose(perturbed, plain)


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_caches_skip_steps(call, tinies, ksampler, empty, node):
    options = {"reuse_threshold": 3.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    plain = ksampler(empty(), steps=20)
    cached = ksampler(empty(), call(node, model=tinies.model_c, **options), steps=20)
    assert cached["samples"].isfinite().all() and apart(cached, plain) > 1e-6


def test_torch_compile(call, tinies, ksampler, empty, condition_calls):
    """Traced as for any backend; what a run does not change is outside of what is compiled."""
    plain = ksampler(empty())
    condition_calls.clear()
    compiled = ksampler(empty(), call("TorchCompileModel", model=tinies.model_c, backend="eager"))
    assert apart(compiled, plain) < 1e-4 and len(condition_calls) == 1
