"""Stage A's training: a VQGAN (arXiv 2012.09841) whose decoder also learns latents that are not quantized.

Stage B draws unquantized latents, so a share of every batch is decoded as it was encoded; the rest is quantized, with
its gradient passed straight through to the encoder (arXiv 1711.00937).
"""

import copy
import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from ...checkpoints.load import load_stage_a
from ...checkpoints.sets import SET
from ...models.blocks import to_rows
from ...models.stage_a import VQGAN, StageAConfig
from ...util.errors import WuerstchenError
from ..data.buckets import bucket_sizes
from ..data.options import DataOptions
from ..loop.draws import Draws
from ..loop.task import Task
from ..options import check_at_least, check_shares, option
from .conditioning import copied, weight_file
from .discriminator import Balance, PatchDiscriminator, adversarial_loss, discriminator_loss
from .losses import quantization_loss
from .perceptual import PerceptualDistance, load_perceptual

MEASURED = 64  # pictures whose latents the scale factor is measured on
SHOWN = 8  # pictures in samples


@dataclass(frozen=True)
class Options:
    """The first options are weights of losses; a loss with weight 0 is left out."""

    l1: float = option(1.0, "weight of the mean absolute error of the reconstruction")
    mse: float = option(0.0, "weight of the mean squared error of the reconstruction")
    codebook: float = option(1.0, "weight of the codebook and commitment losses")
    commitment: float = option(0.25, "weight of the commitment loss relative to the codebook loss")
    perceptual: float = option(1.0, "weight of the perceptual loss, which needs perceptual_weights")
    adversarial: float = option(0.5, "weight of the adversarial loss")
    adversarial_start: int = option(0, "step at which adversarial training starts")
    adversarial_adaptive: bool = option(
        True, "scale the adversarial loss by the ratio of the gradient norms, as VQGAN does"
    )
    discriminator_width: int = option(64, "channels of the discriminator's first layer, a multiple of 4")
    discriminator_layers: int = option(
        3, "layers in which the discriminator's channels grow; with 3 a patch has 70x70 pixels"
    )
    perceptual_weights: str = option("", "torchvision's weights of vgg16; empty: no perceptual loss")
    lpips_weights: str = option("", "LPIPS's weights for VGG16; empty: all channels have weight 1")
    crop: int = option(256, "side of the training crops in pixels, a multiple of 4")
    continuous: float = option(0.5, "share of pictures that are decoded without quantization")
    revive_every: int = option(
        100, "codebook vectors that were not used for this many steps are reset to random latents"
    )
    init: str = option("", "a Stage A to start from, in any layout; [network] is then taken from it")
    measure_scale: bool = option(
        True, "measure scale_factor at export, so that latents have unit variance; false: keep the network's"
    )
    network: StageAConfig = option(StageAConfig(), "the network's sizes, if init is empty")

    def __post_init__(self):
        smallest = max(16, 3 * 2**self.discriminator_layers) if self.adversarial else 16
        if self.crop < smallest or self.crop % 4:
            raise WuerstchenError(f"crop is {self.crop}: it must be a multiple of 4, {smallest} or more")
        check_shares(self, "continuous")
        weights = ("l1", "mse", "codebook", "commitment", "perceptual", "adversarial")
        check_at_least(0, self, *weights, "adversarial_start")
        check_at_least(1, self, "revive_every", "discriminator_layers")
        if self.discriminator_width < 4 or self.discriminator_width % 4:
            raise WuerstchenError(f"discriminator_width is {self.discriminator_width}: it must be a multiple of 4")
        if self.lpips_weights and not self.perceptual_weights:
            raise WuerstchenError("lpips_weights is given without perceptual_weights, whose features it weights")


class StageA(Task):
    """The VQGAN, its discriminator, and the frozen network of the perceptual loss if its weights are given."""

    def __init__(self, vqgan: VQGAN, perceptual: PerceptualDistance | None, options: Options, data: DataOptions):
        super().__init__()
        self.options, self.data = options, data
        self.vqgan = vqgan
        self.register_buffer("idle", torch.zeros(vqgan.config.codebook_size, dtype=torch.int64))
        self.discriminator = None
        if options.adversarial:
            self.discriminator = PatchDiscriminator(options.discriminator_width, options.discriminator_layers)
            self.leaves_out = options.adversarial_start > 0
        self.frozen = () if perceptual is None else (perceptual,)
        self.pictures: tuple[Tensor, ...] = ()

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """The losses "reconstruction" and "codebook", and "perceptual", "adversarial", "discriminator" if they apply.

        With an adaptive weight "adversarial" is reported without it, since it is applied to the gradient.
        """
        if hasattr(self, "reshard"):
            raise WuerstchenError(
                "Stage A's codebook is written to, which sharded weights don't allow: use DDP, not FSDP"
            )
        options = self.options
        pictures = _crop(batch["image"], options.crop, draws.uniform(2))
        is_quantized = draws.uniform(1, 1, 1) >= options.continuous
        latent = self.vqgan.encode(pictures).float()
        if self.training and draws.step % options.revive_every == 0:
            self._revive(latent.detach(), draws)
        quantized, indices = self.vqgan.quantize(latent)
        if self.training:
            self._count(indices)
        straight_through = latent + (quantized - latent).detach()
        scale = self.vqgan.config.scale_factor
        hidden = self.vqgan.up_blocks(torch.where(is_quantized, straight_through, latent) * scale)
        drawn = self.vqgan.out_block(hidden).float()

        codebook_loss = quantization_loss(latent * scale, quantized * scale, options.commitment)
        losses = {"codebook": options.codebook * codebook_loss}
        if self.discriminator is not None and draws.step >= options.adversarial_start:
            drawn, adversarial = self._adversarial(pictures, drawn, hidden)
            losses |= adversarial
        losses["reconstruction"] = options.l1 * F.l1_loss(drawn, pictures) + options.mse * F.mse_loss(drawn, pictures)
        if self.frozen:
            losses["perceptual"] = options.perceptual * self.frozen[0](drawn, pictures).mean()
        return losses

    @torch.no_grad()
    def exported(self) -> dict[str, nn.Module]:
        """The VQGAN; if its scale factor is to be measured, the data's latents have about unit variance."""
        if not self.options.measure_scale:
            return {"stage_a": self.vqgan}
        parts = self._first_pictures().split(SHOWN)
        latents = torch.cat([self.vqgan.encode(part.to(self.idle.device)).float() for part in parts])
        measured = copy.copy(self.vqgan)
        scale = latents.std().item() * self.vqgan.config.scale_factor
        measured.config = dataclasses.replace(self.vqgan.config, scale_factor=scale)
        return {"stage_a": measured}

    def samples(self) -> Tensor:
        """The data's first pictures, each beside what is decoded from its latent."""
        pictures = self._first_pictures()[:SHOWN].to(self.idle.device)
        drawn = self.vqgan.decode(self.vqgan.encode(pictures)).clamp(0, 1)
        return rearrange([pictures, drawn], "two b c h w -> (b two) h w c")

    def _first_pictures(self) -> Tensor:
        if not self.pictures:
            self.pictures = (self.data.first_pictures(MEASURED if self.options.measure_scale else SHOWN),)
        return self.pictures[0]

    def _adversarial(self, pictures: Tensor, drawn: Tensor, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The drawn pictures for the other losses, and the adversarial and discriminator losses.

        Neither loss has a gradient for the other's network.
        """
        shown, weight = drawn, self.options.adversarial
        if self.options.adversarial_adaptive:
            (drawn, shown), weight = Balance.apply(drawn, hidden, weight), 1.0
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        logits = functional_call(self.discriminator, fixed, (shown,))
        real, fake = self.discriminator(torch.cat([pictures, drawn.detach()])).chunk(2)
        return drawn, {
            "adversarial": weight * adversarial_loss(logits),
            "discriminator": discriminator_loss(real, fake),
        }

    @torch.no_grad()
    def _count(self, indices: Tensor) -> None:
        """Counts for how many batches a codebook vector has not been used in any process."""
        used = torch.zeros_like(self.idle)
        used[indices.flatten()] = 1
        if dist.is_initialized():
            dist.all_reduce(used, dist.ReduceOp.MAX)
        self.idle.add_(1).mul_(1 - used)

    @torch.no_grad()
    def _revive(self, latent: Tensor, draws: Draws) -> None:
        """Resets idle codebook vectors to random points of the latents, the same in all processes."""
        codebook = self.vqgan.vquantizer.codebook.weight
        idle = self.idle >= self.options.revive_every
        world = dist.get_world_size() if dist.is_initialized() else 1
        each = -(-len(codebook) // (world * len(latent)))
        points = to_rows(latent * self.vqgan.config.scale_factor).flatten(1, 2)
        drawn = (draws.uniform(each) * points.shape[1]).long()
        points = points.gather(1, drawn[..., None].expand(-1, -1, points.shape[2]))
        if dist.is_initialized():
            gathered = [torch.empty_like(points) for _ in range(world)]
            dist.all_gather(gathered, points)
            points = torch.cat(gathered)
        codebook[idle] = rearrange(points, "b n c -> (n b) c")[: int(idle.sum())].to(codebook.dtype)
        self.idle[idle] = 0


def build(options: Options, data: DataOptions) -> StageA:
    """Raises WuerstchenError if a file can't be loaded, or the data's pictures are too small to crop."""
    sizes = bucket_sizes(data.size) if data.buckets else [(data.size, data.size)]
    smallest = min(map(min, sizes))
    if data.size % 4 or smallest < options.crop:
        raise WuerstchenError(
            f"size is {data.size}: it must be a multiple of 4, and the pictures' sides, {smallest} or more, no shorter "
            f"than crop ({options.crop})"
        )
    if options.init:
        vqgan = copied(load_stage_a(weight_file("init", options.init, SET["stage_a"])))
    else:
        vqgan = VQGAN(options.network)
    return StageA(vqgan, _perceptual(options), options, data)


def _perceptual(options: Options) -> PerceptualDistance | None:
    if not (options.perceptual and options.perceptual_weights):
        return None
    try:
        return load_perceptual(options.perceptual_weights, options.lpips_weights or None)
    except WuerstchenError as error:
        raise WuerstchenError(
            f"perceptual_weights: {error}; --perceptual-weights '' --lpips-weights '' leaves the perceptual loss out"
        ) from error


def _crop(pictures: Tensor, side: int, offsets: Tensor) -> Tensor:
    """(B, 3, H, W), offsets (B, 2) in [0, 1) -> (B, 3, side, side), one crop of each picture"""
    free = torch.tensor([have - side + 1 for have in pictures.shape[2:]], device=offsets.device)
    start = (offsets * free).long()
    rows, columns = (start[:, i, None] + torch.arange(side, device=offsets.device) for i in range(2))
    batch = torch.arange(len(pictures), device=offsets.device)
    return rearrange(pictures[batch[:, None, None], :, rows[:, :, None], columns[:, None]], "b h w c -> b c h w")
