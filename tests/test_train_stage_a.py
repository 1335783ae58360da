"""Stage A's training: its losses one by one, the adversary, the codebook, and a run from pictures to a file."""

import copy
import dataclasses
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import wuerstchen_core as w
from wuerstchen_core import cli
from wuerstchen_core.models.stage_a import StageAConfig
from wuerstchen_core.training import command, mini, options
from wuerstchen_core.training.data_options import DataOptions
from wuerstchen_core.training.discriminator import PatchDiscriminator, adversarial_loss, discriminator_loss
from wuerstchen_core.training.draws import Draws
from wuerstchen_core.training.perceptual import load_perceptual
from wuerstchen_core.training.stage_a import Options, build

TINY = Options(
    network=StageAConfig(widths=(8, 16), bottleneck_blocks=1, codebook_size=24, scale_factor=0.5),
    crop=24,
    discriminator_width=4,
    discriminator_layers=2,
)


DATA = DataOptions(data="pictures", size=64, batch=3, workers=0, buckets=False)


def tiny(data=DATA, **changes):
    """A task with random gates, as after some training, whose encoder is told from its decoder by both losses."""
    torch.manual_seed(0)
    task = build(dataclasses.replace(TINY, **changes), data)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if name.endswith("gammas"):
                parameter.normal_(std=0.5)
    return task


def pictures(count=3, height=32, width=40, seed=1):
    """Smooth ones, so that reconstruction is something to learn."""
    coarse = torch.rand(count, 3, 3, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def batch(**changes):
    return {"image": pictures(**changes)}


def at(step=0, count=3, **places):
    return Draws(0, step, count, **places)


def crops(images, draws, side):
    places = (draws.uniform(2) * torch.tensor([images.shape[2] - side + 1, images.shape[3] - side + 1])).long()
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(images, places.tolist())])


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)


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


def test_idle_vectors_move_to_where_latents_are():
    task = tiny(adversarial=0.0, revive_every=3)
    codes = task.vqgan.vquantizer.codebook.weight
    with torch.no_grad():
        codes[4:] += 100  # whatever the latents are, these are not the nearest
    start = codes.detach().clone()
    for step in range(3):
        task(batch(), at(step))
        task.eval()
        task(batch(), at(step))
        task(batch(), at(3))
        task.train()
    assert torch.equal(codes, start)  # in eval mode nothing is counted or revived
    idle = task.idle.clone()
    assert (idle[4:] == 3).all() and idle[:4].min() == 0

    task(batch(), at(3))
    dead = idle >= 3
    points = (task.vqgan.encode(crops(pictures(), at(3), 24)) * 0.5).permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.equal(codes[~dead], start[~dead])
    assert (codes[dead, None] - points).abs().amax(dim=2).amin(dim=1).max() < 1e-5
    assert len(codes[dead].unique(dim=0)) > 10
    assert task.idle[dead].max() <= 1


def two_parts(rank, world, folder):
    """What a process of two has: the codebook after a revival, and after steps of DDP; saved to a file."""
    task, latent = tiny(revive_every=2), torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    task.idle[3:] = 2
    part = slice(rank * 4 // world, (rank + 1) * 4 // world)
    task._revive(latent[part], at(2, 4 // world, rank=rank, world=world))
    task._count(torch.arange(10)[rank::world])
    revived = {"codes": task.vqgan.vquantizer.codebook.weight.detach().clone(), "idle": task.idle.clone()}

    task = tiny(revive_every=2, adversarial_start=3)
    model = nn.parallel.DistributedDataParallel(task, find_unused_parameters=task.leaves_out) if world > 1 else task
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.01)
    images = pictures(4)[part]
    for step in range(5):
        losses = model({"image": images}, at(step, 4 // world, rank=rank, world=world))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    parameters = {name: parameter.detach() for name, parameter in task.named_parameters()}
    torch.save({"revived": revived, "parameters": parameters}, Path(folder) / f"{rank}.pt")


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    two_parts(rank, 2, folder)
    dist.destroy_process_group()


def test_processes_have_one_codebook(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=process, args=(rank, tmp_path)) for rank in range(2)]
    for one in started:
        one.start()
    for one in started:
        one.join(timeout=240)
    assert [one.exitcode for one in started] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    (tmp_path / "whole").mkdir()
    two_parts(0, 1, tmp_path / "whole")
    whole = torch.load(tmp_path / "whole" / "0.pt")
    for part in (first, second):
        assert torch.equal(part["revived"]["codes"], whole["revived"]["codes"])
        assert torch.equal(part["revived"]["idle"], whole["revived"]["idle"])
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name


def test_shards_are_refused():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        with pytest.raises(w.WuerstchenError, match="DDP, not FSDP"):
            fully_shard(tiny(), mesh=mesh)(batch(), at())
    finally:
        dist.destroy_process_group()


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pictures of 96x80."""
    made = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(pictures(10, 80, 96)):
        Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(made / f"{i}.png")
    return made


def test_exported_latents_have_unit_variance_and_pictures_stay(folder, tmp_path):
    data = dataclasses.replace(DATA, data=str(folder))
    task = tiny(data).eval()
    (path,) = task.export(tmp_path, torch.float32)
    exported = w.load_stage_a(path)
    assert path.name == "stage_a.safetensors" and exported.config.codebook_size == 24
    assert task.vqgan.config.scale_factor == 0.5 != exported.config.scale_factor
    seen = next(dataclasses.replace(data, batch=64).open(seed=0))["image"]
    with torch.no_grad():
        latents = exported.encode(seen)
        torch.testing.assert_close(exported.decode(latents), task.vqgan.decode(task.vqgan.encode(seen)))
    assert latents.std().item() == pytest.approx(1, abs=1e-4)
    every = torch.stack(
        [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in folder.iterdir()]
    )
    with torch.no_grad():
        assert exported.encode(every).std().item() == pytest.approx(1, abs=0.1)

    fixed = tiny(data, measure_scale=False).eval()
    assert w.load_stage_a(fixed.export(tmp_path, torch.float16)[0]).config.scale_factor == 0.5


def test_samples_are_the_same_pictures_each_beside_its_reconstruction(folder):
    task = tiny(dataclasses.replace(DATA, data=str(folder), buckets=True), crop=64).eval()
    with torch.no_grad():
        samples = task.samples()
        assert samples.shape == (16, 64, 64, 3) and samples.min() >= 0 and samples.max() <= 1
        drawn = task.vqgan.decode(task.vqgan.encode(samples[::2].permute(0, 3, 1, 2)))
    torch.testing.assert_close(samples[1::2], drawn.clamp(0, 1).permute(0, 2, 3, 1))
    originals = samples[::2]
    assert len(originals.flatten(1).unique(dim=0)) == 8
    with torch.no_grad():
        task.vqgan.out_block[0].bias += 0.1
        assert torch.equal(task.samples()[::2], originals) and not torch.equal(task.samples(), samples)


def test_a_run_may_begin_with_a_trained_stage_a(tmp_path):
    given = tiny(network=StageAConfig(widths=(8, 16, 24), bottleneck_blocks=2, codebook_size=5)).vqgan
    w.save(given, tmp_path / "given.safetensors")
    task = tiny(init=str(tmp_path / "given.safetensors"))
    assert task.vqgan.config == given.config and len(task.idle) == 5
    assert all(
        torch.equal(task.vqgan.state_dict()[name], value)
        for name, value in given.state_dict().items()
        if "gammas" not in name
    )
    assert all(parameter.requires_grad for parameter in task.vqgan.parameters())
    sum(task(batch(), at()).values()).backward()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"crop": 30}, "crop is 30: it must be a multiple of 4"),
        ({"crop": 8}, "crop is 8: .* 16 or more"),
        ({"crop": 20, "discriminator_layers": 3}, "crop is 20: .* 24 or more"),
        ({"continuous": 1.5}, "continuous is 1.5"),
        ({"revive_every": 0}, "revive_every is 0"),
        ({"discriminator_width": 6}, "discriminator_width is 6"),
        ({"discriminator_layers": 0}, "discriminator_layers is 0"),
        ({"lpips_weights": "lin.pth"}, "lpips_weights is given without perceptual_weights"),
    ],
)
def test_options_out_of_range_are_named(changes, told):
    with pytest.raises(w.WuerstchenError, match=told):
        tiny(**changes)


@pytest.mark.parametrize("changes", [{"size": 20}, {"size": 66}, {"size": 256, "buckets": True, "crop": 256}])
def test_pictures_that_can_not_be_cropped_are_told_of_before_the_first_step(changes):
    crop = changes.pop("crop", 24)
    with pytest.raises(w.WuerstchenError, match=f"size is {changes['size']}: it must be a multiple of 4, .*crop"):
        tiny(dataclasses.replace(DATA, **changes), crop=crop)


def trained(task, parameters, rate, steps):
    """Losses by name, over the steps."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    seen = []
    for step in range(steps):
        losses = task(batch(), at(step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        seen.append({name: loss.item() for name, loss in losses.items()})
    return {name: [losses[name] for losses in seen] for name in seen[-1] if name in seen[0]}


def test_a_short_training_lowers_the_loss():
    task = tiny(adversarial_start=50)
    error = trained(task, task.parameters(), 0.01, 60)["reconstruction"]
    assert sum(error[40:50]) < 0.4 * sum(error[:10]) and sum(error[50:]) < 0.5 * sum(error[:10])


def test_the_adversary_learns_to_tell_drawn_pictures():
    task = tiny()
    losses = trained(task, task.discriminator.parameters(), 3e-3, 30)
    assert losses["discriminator"][0] > 0.9 and losses["discriminator"][-1] < 0.5


def train(folder, run, *more):
    """The tiny network by the command line, with all that a resumption could get wrong."""
    options = {
        "config": "mini", "data": folder, "folder": run, "size": 64, "batch": 3, "workers": 0, "warm_up": 0,
        "cool_down": 0, "crop": 24, "adversarial_start": 4, "revive_every": 2, "discriminator_width": 4,
        "network.widths": "[8, 16]", "network.bottleneck_blocks": 1, "network.codebook_size": 24, "ema_every": 2,
        "sample_every": 3, "accumulate": 2,
    }  # fmt: skip
    given = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return cli.main(["train", "stage-a", *given, *more])


def test_the_command_trains_and_goes_on_as_if_never_stopped(folder, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(folder, whole, "--steps", "6") == 0
    assert train(folder, parts, "--steps", "3") == 0
    assert w.load_stage_a(parts / "stage_a.safetensors").config.widths == (8, 16)
    assert train(folder, parts, "--steps", "6") == 0
    ours, theirs = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (parts, whole))
    for kept in ("weights", "averaged"):
        assert ours[kept].keys() == theirs[kept].keys()
        assert all(torch.equal(ours[kept][name], value) for name, value in theirs[kept].items())
    assert any(name.startswith("discriminator") for name in theirs["optimizer"])
    assert (parts / "stage_a.safetensors").read_bytes() == (whole / "stage_a.safetensors").read_bytes()
    assert Image.open(whole / "samples" / "0000006.png").size == (4 * 68 + 4, 4 * 68 + 4)
    assert not any("perceptual" in name or "frozen" in name for name in theirs["weights"])
    exported = w.load_stage_a(whole / "stage_a.safetensors")
    assert exported.config.scale_factor != 1 and exported.decode(exported.encode(pictures())).shape == (3, 3, 32, 40)


@pytest.mark.parametrize("name, network", [("mini", mini.STAGE_A), ("v2", StageAConfig())])
def test_shipped_configurations_have_the_networks_of_their_names(name, network):
    assert options.read(Options, stage_options(name), name).network == network


def stage_options(name):
    """What the shipped configuration has for Stage A itself."""
    table = options.load(command.CONFIGS / name / "stage_a.toml")
    own = {field.name for field in dataclasses.fields(Options)}
    return {key: value for key, value in table.items() if key in own}
