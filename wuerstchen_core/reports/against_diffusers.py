"""Both sides of each stage: our network and diffusers', of the same sizes and with the same random weights.

A stage is built, measured and let go of before the next, and the two sides share the tensors of their weights wherever
the layouts are the same. diffusers' networks run in its own pipelines at their defaults, which are given the states of
a text; the text encoders and Stage A are called as the pipelines call them.
"""

import gc
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.options import STAGE_B, STAGE_C, SamplingOptions
from ..geometry import Geometry
from ..pipeline import Wuerstchen, decode, sample_stage_b, sample_stage_c
from . import diffusers_networks
from .cost import operations
from .timing import Run

DIFFUSERS, OURS, DEFAULTS = SIDES = ("diffusers", "ours", "our defaults")
STEPS_C, STEPS_B = 60, 12  # of diffusers' pipelines
STEP = 128  # what the sides of a picture must be multiples of for diffusers' to be of that size
PROMPTS = ["a lighthouse by the sea in a storm, with three gulls above it", ""]  # the second is the negative one


@dataclass(frozen=True)
class Task:
    """What is drawn, on which device. The steps are those of diffusers, and ours beside them."""

    geometry: Geometry
    batches: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    steps_c: int = STEPS_C
    steps_b: int = STEPS_B


@dataclass(frozen=True)
class Stage:
    """A stage at one batch size, as each side runs it.

    Attributes:
        operations: multiplications and additions of one of our steps.
        weights: bytes.
        steps: of each side; a stage without any is one step.
        runs: of each side.
    """

    name: str
    batch: int
    operations: int
    weights: int
    steps: dict[str, int]
    runs: dict[str, Run]


def stages(networks: Wuerstchen, task: Task) -> Iterator[Stage]:
    """Every stage in the order of a picture, at each batch size.

    Args:
        networks: on the meta device, for their sizes.

    Raises:
        WuerstchenError: diffusers is missing, or has no network of such a size.
    """
    diffusers_networks.require_diffusers()
    for stage in (_text_encoders, _stage_c, _stage_b, _stage_a):
        yield from stage(networks, task)
        gc.collect()  # diffusers' pipelines refer to themselves


def _text_encoders(networks: Wuerstchen, task: Task) -> Iterator[Stage]:
    """Stage C's reads the prompt and the negative one, Stage B's the prompt."""
    outlines = [networks.text_encoder_c]
    if networks.text_encoder_b is not None and networks.text_encoder_b is not networks.text_encoder_c:
        outlines.append(networks.text_encoder_b)
    encoders = [filled(outline, task.dtype, task.device) for outline in outlines]
    clips = [diffusers_networks.clip(encoder) for encoder in encoders]
    last_of_theirs = clips[-1] if networks.text_encoder_b is not None else None

    def theirs(clip: nn.Module, prompt: str) -> Tensor:
        tokens = encoders[0].tokenize([prompt])[0][0].to(task.device)
        end = encoders[0].tokenizer.eot_token_id
        mask = ((tokens == end).cumsum(dim=1) <= 1).long()  # the padding is left out, the first end is not
        return clip(tokens, attention_mask=mask).last_hidden_state

    @torch.no_grad()
    def in_diffusers(steps, done):
        states = [theirs(clips[0], prompt) for prompt in PROMPTS]
        return states if last_of_theirs is None else [*states, theirs(last_of_theirs, PROMPTS[0])]

    @torch.inference_mode()
    def in_ours(steps, done):
        return [encoder(PROMPTS[: 2 - number]) for number, encoder in enumerate(encoders)]

    count = sum(
        _counted(lambda outline=outline, number=number: outline.encode_tokens(_meta(2 - number, 77, dtype=torch.long)))
        for number, outline in enumerate(outlines)
    )
    weights = sum(map(_bytes, encoders))
    for batch in task.batches:
        yield Stage("text encoders", batch, count, weights, *_single(in_diffusers, in_ours))


def _stage_c(networks: Wuerstchen, task: Task) -> Iterator[Stage]:
    """With guidance."""
    from diffusers import DDPMWuerstchenScheduler
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPriorPipeline

    outline, config, geometry = networks.stage_c, networks.stage_c.config, task.geometry
    ours = filled(outline, task.dtype, task.device)
    ours.out[-1].weight.mul_(0.1)  # clear of the pole of (x - a) / |1 - b|
    theirs = diffusers_networks.prior(ours)
    pipe = WuerstchenPriorPipeline(None, None, theirs, DDPMWuerstchenScheduler())
    pipe.set_progress_bar_config(disable=True)
    text, negative = torch.randn(2, 1, 77, config.text_width).to(task.device, task.dtype)

    def at(batch: int) -> Stage:
        texts = [states.repeat(batch, 1, 1) for states in (text, negative)]
        latent = torch.zeros(batch, config.latent_channels, *geometry.stage_c, device=task.device)

        def in_diffusers(steps, done):
            pipe.encode_prompt = lambda *_, **__: texts
            return pipe(
                prompt_embeds=text,
                negative_prompt_embeds=negative,
                height=geometry.height,
                width=geometry.width,
                num_inference_steps=steps,
                num_images_per_prompt=batch,
                callback_on_step_end=_calling(done),
            ).image_embeddings

        def in_ours(options):
            return lambda steps, done: sample_stage_c(
                ours, latent, text, negative, replace(options, steps=steps), progress=lambda *_: done()
            )

        def sample(steps: int) -> None:
            condition = outline.condition(_meta(2 * batch, 77, config.text_width))
            _sample(outline, condition, _meta(2 * batch, *latent.shape[1:]), steps)

        return Stage(
            "Stage C",
            batch,
            _counted_step(sample),
            _bytes(ours),
            {DIFFUSERS: task.steps_c, OURS: task.steps_c, DEFAULTS: STAGE_C.steps},
            {DIFFUSERS: in_diffusers, OURS: in_ours(_like_diffusers(cfg=8.0)), DEFAULTS: in_ours(STAGE_C)},
        )

    yield from map(at, task.batches)


def _stage_b(networks: Wuerstchen, task: Task) -> Iterator[Stage]:
    """Without guidance."""
    from diffusers import DDPMWuerstchenScheduler
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDecoderPipeline

    outline, config, geometry = networks.stage_b, networks.stage_b.config, task.geometry
    ours = filled(outline, task.dtype, task.device)
    ours.clf[1].weight.mul_(0.3)
    ours.clf[1].bias[len(ours.clf[1].bias) // 2 :] += 3  # sigmoid(b) near 1: the noise is about x, as in trained ones
    theirs = diffusers_networks.decoder(ours)
    pipe = WuerstchenDecoderPipeline(None, None, theirs, DDPMWuerstchenScheduler(), None)
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 77, config.text_width).to(task.device, task.dtype)

    def at(batch: int) -> Stage:
        texts = text.repeat(batch, 1, 1), None
        semantic = torch.randn(batch, config.semantic_channels, *geometry.stage_c).to(task.device)
        features = config.latent_space.to_features(semantic).to(task.dtype)

        def in_diffusers(steps, done):
            pipe.encode_prompt = lambda *_, **__: texts
            return pipe(features, PROMPTS[0], steps, output_type="latent", callback_on_step_end=_calling(done)).images

        def in_ours(options):
            return lambda steps, done: sample_stage_b(
                ours, semantic, geometry, text, None, replace(options, steps=steps), progress=lambda *_: done()
            )

        def sample(steps: int) -> None:
            latent = _meta(batch, config.latent_channels, *geometry.stage_a)
            condition = outline.condition(_meta(*semantic.shape), _meta(batch, 77, config.text_width), geometry.stage_a)
            _sample(outline, condition, latent, steps)

        return Stage(
            "Stage B",
            batch,
            _counted_step(sample),
            _bytes(ours),
            {DIFFUSERS: task.steps_b, OURS: task.steps_b, DEFAULTS: STAGE_B.steps},
            {DIFFUSERS: in_diffusers, OURS: in_ours(_like_diffusers(cfg=1.0)), DEFAULTS: in_ours(STAGE_B)},
        )

    yield from map(at, task.batches)


def _stage_a(networks: Wuerstchen, task: Task) -> Iterator[Stage]:
    """Its decoder."""
    outline, config = networks.stage_a, networks.stage_a.config
    ours = filled(outline, task.dtype, task.device)
    theirs = diffusers_networks.vqgan(ours)

    def at(batch: int) -> Stage:
        latent = torch.randn(batch, config.latent_channels, *task.geometry.stage_a).to(task.device)

        @torch.no_grad()
        def in_diffusers(steps, done):
            scaled = theirs.config.scale_factor * latent.to(task.dtype)
            return theirs.decode(scaled).sample.clamp(0, 1).permute(0, 2, 3, 1).float()

        def in_ours(steps, done):
            return decode(ours, latent, task.geometry)

        count = _counted(lambda: outline.decode(_meta(*latent.shape)))
        return Stage("Stage A", batch, count, _bytes(ours), *_single(in_diffusers, in_ours))

    yield from map(at, task.batches)


def _like_diffusers(cfg: float) -> SamplingOptions:
    return SamplingOptions(cfg=cfg, sampler="ddpm", schedule="even")


def _single(in_diffusers: Run, in_ours: Run) -> tuple[dict[str, int], dict[str, Run]]:
    """Of a stage without steps, which is the same at our defaults."""
    runs = {DIFFUSERS: in_diffusers, OURS: in_ours}
    return dict.fromkeys(runs, 1), runs


def _calling(done: Callable[[], None]) -> Callable:
    """A callback of diffusers' pipelines, which take back what it may have changed."""

    def callback(pipe, step, t, tensors):
        done()
        return tensors

    return callback


def filled(outline: nn.Module, dtype: torch.dtype = torch.float32, device="cpu") -> Any:
    """A network like one on the meta device, with random weights.

    They are a million numbers over and over again: a billion of their own would take minutes.
    """
    network = deepcopy(outline).to(dtype).to_empty(device=device).eval().requires_grad_(False)
    numbers = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for tensor in (*network.parameters(), *network.buffers()):
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        fan = tensor[0].numel() if tensor.dim() > 1 else 10
        for piece in tensor.view(-1).split(len(numbers)):
            piece.copy_(numbers[: len(piece)]).mul_(0.5 * fan**-0.5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_var.fill_(1)
    return network


def _sample(network, condition, latent: Tensor, steps: int) -> None:
    modulation = network.modulate(_meta(steps), latent.dtype)
    for step in range(steps):
        network.denoise(latent, [table[step : step + 1] for table in modulation], condition)


def _counted_step(sample: Callable[[int], None]) -> int:
    return _counted(lambda: sample(2)) - _counted(lambda: sample(1))


def _counted(work: Callable) -> int:
    with torch.no_grad():
        return operations(work)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())
