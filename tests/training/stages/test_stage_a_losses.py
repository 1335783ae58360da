"""Stage A's losses one by one, and the adversary's."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import wuerstchen_core as w
from tests.training.stages.stage_a import at, batch, crops, gradients, pictures, tiny
from wuerstchen_core.training.stages.discriminator import PatchDiscriminator, adversarial_loss, discriminator_loss
from wuerstchen_core.training.stages.perceptual import load_perceptual


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """The file of a vgg16 with random weights, and the network."""
    torch.manual_seed(3)
    with torch.device("meta"):
        network = torchvision.models.vgg16()
    network = network.features.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            nn.init.kaiming_normal_(parameter) if parameter.ndim == 4 else parameter.normal_(std=0.1)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in network.state_dict().items()}, path)
    return path, network


def lpips(network, one, other, weights):
    """By the paper: unit length over channels, weighted squared differences, mean over positions, sum over layers."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x, y = ((picture.double() - mean[:, None, None]) / std[:, None, None] for picture in (one, other))
    total = 0
    weights = iter(weights)
    for i, layer in enumerate(copy.deepcopy(network).double()[:30]):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3:
        x, y = layer(x), layer(y)
        if i in (3, 8, 15, 22, 29):
            difference = x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)
            total = total + (difference.square() * next(weights)[:, None, None]).sum(dim=1).mean(dim=(1, 2))
    return total


WIDTHS = (64, 128, 256, 512, 512)


def test_perceptual_distance_is_lpips_of_torchvisions_vgg16(vgg, tmp_path):
    path, network = vgg
    one, other = pictures(2, 24, 32), pictures(2, 24, 32, seed=2)
    plain = load_perceptual(path)
    expected = lpips(network, one, other, [torch.ones(width) for width in WIDTHS])
    torch.testing.assert_close(plain(one, other).double(), expected, rtol=1e-4, atol=0)
    assert plain(one, one).abs().max() == 0
    assert not any(parameter.requires_grad for parameter in plain.parameters())

    judged = [torch.rand(width) for width in WIDTHS]
    torch.save({f"lin{i}.model.1.weight": v.view(1, -1, 1, 1) for i, v in enumerate(judged)}, tmp_path / "lin.pth")
    weighted = load_perceptual(path, tmp_path / "lin.pth")
    torch.testing.assert_close(weighted(one, other).double(), lpips(network, one, other, judged), rtol=1e-4, atol=0)


def test_perceptual_files_that_are_none_are_named(vgg, tmp_path):
    path, _ = vgg
    other = {name: value for name, value in torch.load(path, weights_only=True).items() if "features.28" not in name}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(w.WuerstchenError, match=r"other.pth: this is not torchvision's vgg16, features.28.weight"):
        load_perceptual(tmp_path / "other.pth")
    with pytest.raises(w.WuerstchenError, match="vgg16.pth: this is not LPIPS's"):
        load_perceptual(path, path)
    with pytest.raises(w.WuerstchenError, match="perceptual_weights: .*nowhere.pth: there is no such file; .*leaves"):
        tiny(perceptual_weights=str(tmp_path / "nowhere.pth"))


def test_hinge_losses():
    real, drawn = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, -0.25], [0.5, 1.0]])
    assert discriminator_loss(real, drawn).item() == pytest.approx(
        ((0 + 0.5 + 2 + 0) / 4 + (0 + 0.75 + 1.5 + 2) / 4) / 2
    )
    assert adversarial_loss(drawn).item() == pytest.approx((3 + 0.25 - 0.5 - 1) / 4)


def test_a_patch_of_the_discriminator_has_70_pixels_and_norms_of_its_own_picture():
    discriminator = PatchDiscriminator(width=8)
    discriminator.net = nn.Sequential(*(m for m in discriminator.net if not isinstance(m, nn.GroupNorm)))
    image = torch.rand(1, 3, 128, 128, requires_grad=True)
    discriminator(image)[0, 0, 7, 7].backward()
    seen = image.grad.abs().sum(dim=(0, 1)) > 0
    assert (seen.any(dim=0).sum(), seen.any(dim=1).sum()) == (70, 70)

    discriminator, images = PatchDiscriminator(width=8), torch.rand(3, 3, 64, 64)
    assert discriminator(images).shape == (3, 1, 6, 6)
    torch.testing.assert_close(discriminator(images)[1:2], discriminator(images[1:2]))


def test_losses_are_those_of_crops_through_encoder_codebook_and_decoder(vgg):
    options = {"l1": 0.7, "mse": 3.0, "codebook": 0.2, "commitment": 0.3, "perceptual": 0.6, "adversarial": 0.4}
    task = tiny(**options, continuous=0.5, adversarial_adaptive=False, perceptual_weights=str(vgg[0]))
    losses = task(batch(), at())

    task.vqgan.train()
    draws = at()
    seen = crops(pictures(), draws, 24)
    raw = task.vqgan.encode(seen) * 0.5
    codes = task.vqgan.vquantizer.codebook.weight
    distances = (raw.permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(dim=-1)
    nearest = codes[distances.argmin(dim=-1)].permute(0, 3, 1, 2)
    quantized = draws.uniform(1)[:, 0] >= 0.5
    assert 0 < quantized.sum() < 3
    drawn = task.vqgan.decode(torch.where(quantized[:, None, None, None], nearest, raw) / 0.5)
    assert losses.keys() == {"reconstruction", "codebook", "perceptual", "adversarial", "discriminator"}
    expected = {
        "reconstruction": 0.7 * (drawn - seen).abs().mean() + 3 * (drawn - seen).square().mean(),
        "codebook": 0.2 * 1.3 * (raw - nearest).square().mean(),
        "perceptual": 0.6 * lpips(vgg[1], drawn, seen, [torch.ones(width) for width in WIDTHS]).mean().float(),
        "adversarial": -0.4 * task.discriminator(drawn).mean(),
        "discriminator": (
            (1 - task.discriminator(seen)).clamp(min=0).mean() + (1 + task.discriminator(drawn)).clamp(min=0).mean()
        )
        / 2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6)


def test_gradient_passes_straight_through_the_codebook():
    task = tiny(adversarial=0.0, codebook=0.0, continuous=0.0, l1=0.0, mse=1.0)
    loss = task(batch(), at())["reconstruction"]
    encoder = [*task.vqgan.in_block.parameters(), *task.vqgan.down_blocks.parameters()]
    ours = gradients(loss, encoder)

    seen = crops(pictures(), at(), 24)
    latent = task.vqgan.encode(seen)
    quantized = task.vqgan.quantize(latent)[0].detach().requires_grad_()
    (at_quantized,) = torch.autograd.grad(F.mse_loss(task.vqgan.decode(quantized), seen), quantized)
    for one, other in zip(ours, torch.autograd.grad(latent, encoder, at_quantized)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert gradients(loss, task.vqgan.vquantizer.parameters()) == (None,)


def test_all_may_be_continuous_and_the_codebook_still_learns():
    task = tiny(adversarial=0.0, continuous=1.0, mse=1.0, l1=0.0)
    losses = task(batch(), at())
    seen = crops(pictures(), at(), 24)
    torch.testing.assert_close(
        losses["reconstruction"], F.mse_loss(task.vqgan.decode(task.vqgan.encode(seen)), seen), rtol=1e-5, atol=0
    )
    assert gradients(losses["codebook"], task.vqgan.vquantizer.parameters())[0].abs().sum() > 0


def test_adaptive_weight_is_that_of_the_paper_without_a_backward_of_its_own(monkeypatch):
    """Equation 7 of arXiv 2012.09841, at the weights of the last layer."""
    task = tiny(adversarial=0.3, codebook=0.0, adversarial_adaptive=False)
    generator, last = list(task.vqgan.parameters()), task.vqgan.out_block[0].weight
    losses = task(batch(), at())
    longer, shorter = (gradients(losses[name], [last])[0].norm() for name in ("reconstruction", "adversarial"))
    weight = longer / (shorter / 0.3 + 1e-6)
    apart = [gradients(losses[name], generator) for name in ("reconstruction", "adversarial")]
    expected = [a + 0.3 * weight * b / 0.3 if a is not None else None for a, b in zip(*apart)]
    assert not 0.5 < weight < 2

    def refuse(*args, **kwargs):
        raise AssertionError("a backward in the forward")

    task = tiny(adversarial=0.3, codebook=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", refuse)
        patch.setattr(torch.Tensor, "backward", refuse)
        losses = task(batch(), at())
    sum(losses.values()).backward()
    for parameter, gradient in zip(task.vqgan.parameters(), expected):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_two_adversaries_learn_each_from_its_own_loss(adaptive):
    task = tiny(adversarial_adaptive=adaptive, codebook=0.0)
    losses = task(batch(), at())
    vqgan, discriminator = task.vqgan.parameters, task.discriminator.parameters
    assert all(g is None for g in gradients(losses["discriminator"], vqgan()))
    assert all(g.abs().sum() > 0 for g in gradients(losses["discriminator"], discriminator()))
    for name in losses.keys() - {"discriminator"}:
        assert all(g is None for g in gradients(losses[name], discriminator()))
    sums = losses["reconstruction"], losses["reconstruction"] + losses["adversarial"]
    alone, together = (gradients(loss, [task.vqgan.out_block[0].weight])[0] for loss in sums)
    assert (together - alone).norm() > 0.01 * alone.norm()
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in task.parameters())


def test_the_adversary_costs_nothing_before_its_start():
    task = tiny(adversarial_start=5)
    calls = []
    task.discriminator.register_forward_pre_hook(lambda *_: calls.append(1))
    losses = task(batch(), at(4))
    assert losses.keys() == {"reconstruction", "codebook"} and not calls and task.leaves_out
    assert task(batch(), at(5)).keys() == losses.keys() | {"adversarial", "discriminator"} and calls
    assert not tiny(adversarial_start=0).leaves_out
    without = tiny(adversarial=0.0)
    assert without.discriminator is None and not without.leaves_out
    assert without(batch(), at(9)).keys() == losses.keys()


def test_losses_are_float32_under_mixed_precision(vgg):
    task = tiny(perceptual_weights=str(vgg[0]), continuous=0.0, adversarial_adaptive=False)
    exact = task(batch(), at())
    with torch.autocast("cpu", torch.bfloat16):
        losses = task(batch(), at())
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.05, atol=0.01)
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters())
