"""What training and sampling take in parameters and operations, beside the same of Stable Diffusion 2.1.

The paper's table 2 and figure 4 in numbers that do not depend on the machine. The networks have no weights here (they
are on torch's meta device): their operations are counted and not done.

Counted are matrix products, convolutions and attention, a multiplication and an addition as two operations. A training
sample is a forward and a backward pass of what is trained; what the frozen networks make of it is counted apart, and
Stage A's discriminator is not. A picture is one of a batch of one, from text alone, as `Wuerstchen.generate` draws it:
what it computes once a run counts once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ..checkpoints.load import outline as network_outline
from ..checkpoints.sets import find_set
from ..geometry import Geometry
from ..models.semantic_compressor import SemanticCompressor
from ..models.stage_a import VQGAN
from ..models.stage_b import DiffNeXt
from ..models.stage_c import Prior
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from ..pipeline import Wuerstchen
from ..util.errors import WuerstchenError, first_line, one_line

CLIP_H = TextEncoderConfig(width=1024, layers=24, heads=16)


@dataclass(frozen=True)
class Cost:
    """Of a network, or of several together."""

    name: str
    parameters: int
    sample: int = 0  # operations of a training sample, 0 where it is not what is trained
    frozen: int = 0  # those of the frozen networks that the sample needs
    picture: int = 0  # operations of a picture


def operations(work: Callable) -> int:
    """What `work` computes, in multiplications and additions of its matrix products, convolutions and attention."""
    # torch's own formula for the gradients of a convolution knows no groups: a depthwise one would count C times.
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


def released() -> Wuerstchen:
    """The networks of the released v2, without weights."""
    with torch.device("meta"):
        return Wuerstchen(
            stage_a=VQGAN(),
            stage_b=DiffNeXt(),
            stage_c=Prior(),
            text_encoder_c=TextEncoder(),
            text_encoder_b=TextEncoder(CLIP_H),
            semantic_compressor=SemanticCompressor(),
        )


def outline(folder: str | Path) -> Wuerstchen:
    """The networks of a folder that holds a whole set, without weights, which are not read.

    Raises WuerstchenError as `find_set` and the loaders do.
    """
    paths = find_set(folder)
    encoder_c, encoder_b = paths.pop("text_encoder_c"), paths.pop("text_encoder_b", None)
    networks: dict[str, Any] = {role: network_outline(path, role) for role, path in paths.items()}
    read_c: Any = network_outline(encoder_c, "text_encoder")
    read_b: Any = read_c if encoder_b == encoder_c else encoder_b and network_outline(encoder_b, "text_encoder")
    return Wuerstchen(**networks, text_encoder_c=read_c, text_encoder_b=read_b)


def wuerstchen_costs(networks: Wuerstchen, geometry: Geometry, steps_c: int, steps_b: int) -> list[Cost]:
    """Of every network, at a picture's size: Stage C first, with guidance, then Stage B, without.

    Stage C learns on the compressor's latents and its text encoder's states, Stage B on Stage A's latents beside those,
    Stage A on pictures alone.
    """
    stage_a, stage_b, stage_c = networks.stage_a, networks.stage_b, networks.stage_c
    compressor, encoder_c, encoder_b = networks.semantic_compressor, networks.text_encoder_c, networks.text_encoder_b

    picture, reduced = _meta(1, 3, *geometry.work), _meta(1, 3, *geometry.compressor)
    latent_c = _meta(1, stage_c.config.latent_channels, *geometry.stage_c)
    latent_b = _meta(1, stage_b.config.latent_channels, *geometry.stage_a)
    text_c = _meta(1, encoder_c.config.context_length, stage_c.config.text_width)
    text_b = None if encoder_b is None else _meta(1, encoder_b.config.context_length, stage_b.config.text_width)
    time = _meta(1)

    def sample_c(steps: int) -> None:
        condition = stage_c.condition(text_c.expand(2, -1, -1))
        _sample(stage_c, condition, latent_c.expand(2, -1, -1, -1), steps)

    def sample_b(steps: int) -> None:
        condition = stage_b.condition(latent_c, text_b, latent_b.shape[-2:])
        _sample(stage_b, condition, latent_b, steps)

    compressed, encoded = _frozen(lambda: compressor(reduced)), _frozen(lambda: stage_a.encode(picture))
    read_c, read_b = _reading(encoder_c), 0 if encoder_b is None else _reading(encoder_b)
    costs = [
        Cost(
            "Stage C",
            _parameters(stage_c),
            sample=_trained(lambda: stage_c(latent_c, time, text_c)),
            frozen=compressed + read_c,
            picture=_sampling(sample_c, steps_c),
        ),
        Cost(
            "Stage B",
            _parameters(stage_b),
            sample=_trained(lambda: stage_b(latent_b, time, latent_c, text_b)),
            frozen=compressed + read_b + encoded,
            picture=_sampling(sample_b, steps_b),
        ),
        Cost(
            "Stage A",
            _parameters(stage_a),
            sample=_trained(lambda: stage_a.decode(stage_a.encode(picture))),
            picture=_frozen(lambda: stage_a.decode(latent_b)),
        ),
        Cost("semantic compressor", _parameters(compressor)),
    ]
    # Stage C has the prompt and the negative one encoded; Stage B, without guidance, only the prompt.
    if encoder_b is None or encoder_b is encoder_c:
        return [*costs, Cost("text encoder", _parameters(encoder_c), picture=2 * read_c)]
    return [
        *costs,
        Cost("text encoder of Stage C", _parameters(encoder_c), picture=2 * read_c),
        Cost("text encoder of Stage B", _parameters(encoder_b), picture=read_b),
    ]


def stable_diffusion_costs(geometry: Geometry, steps: int = 50) -> list[Cost]:
    """The same of Stable Diffusion 2.1's three networks, with guidance: the U-Net first.

    It is latent diffusion (arXiv 2112.10752) of one stage, on latents of an eighth of the picture's side; its text
    encoder is CLIP H without the last layer.

    Raises:
        ImportError: diffusers, of whose networks it is built, is not installed.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        encoder = TextEncoder(TextEncoderConfig(width=1024, layers=23, heads=16))
    picture = _meta(1, 3, geometry.height, geometry.width)
    latent, text = _meta(2, 4, geometry.height // 8, geometry.width // 8), _meta(2, 77, 1024)
    time = _meta(1)
    read = _reading(encoder)
    return [
        Cost(
            "U-Net",
            _parameters(unet),
            sample=_trained(lambda: unet(latent[:1], time, text[:1]).sample),
            frozen=_frozen(lambda: vae.encode(picture)) + read,
            picture=steps * _frozen(lambda: unet(latent, time, text)),
        ),
        Cost("VAE", _parameters(vae), picture=_frozen(lambda: vae.decode(latent[:1]))),
        Cost("text encoder", _parameters(encoder), picture=2 * read),
    ]


def cost(networks: Wuerstchen, name: str, geometry: Geometry, steps_c: int, steps_b: int) -> Iterator[str]:
    """The costs of a set of networks and of Stable Diffusion 2.1 as a table, a line a network.

    Raises:
        WuerstchenError: a number of steps is below 1.
    """
    for option, steps in (("--steps-c", steps_c), ("--steps-b", steps_b)):
        if steps < 1:
            raise WuerstchenError(f"{option} is {steps}: at least 1 is needed")
    size = f"{geometry.width}×{geometry.height} pixels"
    (rows_c, columns_c), (rows_b, columns_b) = geometry.stage_c, geometry.stage_a
    yield f"operations at {size}, G: 10⁹, T: 10¹²"
    yield ""
    ours = wuerstchen_costs(networks, geometry, steps_c, steps_b)
    yield from _table(
        f"Würstchen {name}",
        ours,
        f"Stage C: {columns_c}×{rows_c}, {steps_c} steps with guidance; "
        f"Stage B: {columns_b}×{rows_b}, {steps_b} steps without",
    )
    yield ""
    try:
        theirs = stable_diffusion_costs(geometry)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "diffusers"
        why = "is not installed" if missing else f"cannot be imported ({one_line(first_line(error))})"
        yield f"Stable Diffusion 2.1 is left out: diffusers, which has its networks, {why}"
        return
    yield from _table(
        "Stable Diffusion 2.1", theirs, f"U-Net: {geometry.width // 8}×{geometry.height // 8}, 50 steps with guidance"
    )
    yield ""
    stage_c, unet = ours[0], theirs[0]
    yield "Stable Diffusion 2.1 beside Würstchen"
    yield f"  {_ratio(unet.sample, stage_c.sample)} the operations of a training sample, U-Net and Stage C"
    yield f"  {_ratio(unet.sample + unet.frozen, stage_c.sample + stage_c.frozen)} with the frozen networks'"
    yield f"  {_ratio(sum(one.picture for one in theirs), sum(one.picture for one in ours))} those of a picture"


def _table(title: str, costs: list[Cost], settings: str) -> Iterator[str]:
    yield f"{title:<26}{'parameters':>12}{'training sample':>18}{'frozen, a sample':>18}{'picture':>12}"
    total = Cost("all", sum(one.parameters for one in costs), picture=sum(one.picture for one in costs))
    for one in (*costs, total):
        figures = (_short(one.sample), _short(one.frozen), _short(one.picture))
        parameters = f"{one.parameters / 1e6:,.1f} M"
        yield "{:<26}{:>12}{:>18}{:>18}{:>12}".format(one.name, parameters, *figures).rstrip()
    yield settings


def _short(count: int) -> str:
    """123.4 G, 5.68 T, or nothing for 0"""
    if not count:
        return ""
    return f"{count / 1e12:,.2f} T" if count >= 1e12 else f"{count / 1e9:,.1f} G"


def _ratio(theirs: int, ours: int) -> str:
    return f"{theirs / ours:5.2f} ×"


def _trained(work: Callable[[], Tensor]) -> int:
    return operations(lambda: work().sum().backward())


def _frozen(work: Callable) -> int:
    with torch.no_grad():
        return operations(work)


def _reading(encoder: TextEncoder) -> int:
    """Of one prompt."""
    tokens = _meta(1, encoder.config.context_length, dtype=torch.long)
    return _frozen(lambda: encoder.encode_tokens(tokens))


def _sampling(sample: Callable[[int], None], steps: int) -> int:
    """Of a run of so many steps, all of which cost the same."""
    one, two = (_frozen(partial(sample, count)) for count in (1, 2))
    return one + (steps - 1) * (two - one)


def _sample(network: Prior | DiffNeXt, condition, latent: Tensor, steps: int) -> None:
    modulation = network.modulate(_meta(steps), latent.dtype)
    for step in range(steps):
        network.denoise(latent, [table[step : step + 1] for table in modulation], condition)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _convolution_backward(gradient, x, weight, bias, stride, padding, dilation, transposed, *rest, out_shape) -> int:
    """As many operations as the convolution has, for each of the gradients of its input and its weight."""
    output_mask = rest[-1]
    return conv_flop_count(x, weight, gradient, transposed) * sum(output_mask[:2])
