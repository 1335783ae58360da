"""Stage A's training: the codebook, and a run from pictures to a file."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import wuerstchen_core as w
from tests.training.runs import process
from tests.training.stages.stage_a import DATA, at, batch, crops, one_of_two, pictures, tiny, two_parts
from wuerstchen_core import cli
from wuerstchen_core.models import stage_a
from wuerstchen_core.models.stage_a import Codebook, StageAConfig
from wuerstchen_core.training import command, options
from wuerstchen_core.training.stages.stage_a import Options


def test_the_nearest_vectors_are_searched_for_in_bounded_memory(monkeypatch):
    torch.manual_seed(0)
    codebook, latent = Codebook(100, 4), torch.randn(2, 4, 9, 7)
    points = latent.permute(0, 2, 3, 1)
    expected = (points[..., None, :] - codebook.codebook.weight).double().square().sum(dim=-1).argmin(dim=-1)
    assert torch.equal(codebook.nearest(latent), expected)
    sizes, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda *given: sizes.append(cdist(*given).numel()) or cdist(*given))
    for most in (4000, 250, 1):
        monkeypatch.setattr(stage_a, "DISTANCES", most)
        assert torch.equal(codebook.nearest(latent), expected)
        assert max(sizes) <= max(most, 100) and sum(sizes) == 2 * 9 * 7 * 100
        sizes.clear()


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


def test_processes_have_one_codebook(tmp_path):
    started = [process(one_of_two, rank, tmp_path) for rank in range(2)]
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
    seen = next(dataclasses.replace(data, batch=64).open(seed=0))["image"].float() / 255
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


@pytest.mark.parametrize("name, network", [
    ("mini", StageAConfig(widths=(48, 96), bottleneck_blocks=3, codebook_size=1024, scale_factor=1.0)),
    ("v2", StageAConfig()),
])  # fmt: skip
def test_shipped_configurations_have_the_networks_of_their_names(name, network):
    assert options.read(Options, stage_options(name), name).network == network


def stage_options(name):
    """What the shipped configuration has for Stage A itself."""
    table = options.load(command.CONFIGS / name / "stage_a.toml")
    own = {field.name for field in dataclasses.fields(Options)}
    return {key: value for key, value in table.items() if key in own}
