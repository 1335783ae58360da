"""Inputs that several nodes have."""

from comfy_api.latest import io

from ..wuerstchen_core.diffusion.options import SamplingOptions
from ..wuerstchen_core.diffusion.samplers import SAMPLERS
from ..wuerstchen_core.diffusion.schedule import SCHEDULES
from ..wuerstchen_core.models.defaults import RELEASED, SMALL
from .latents import LARGEST_SIDE, SMALLEST_SIDE

CATEGORY = "Würstchen"
WEIGHT_DTYPES = ("default", "fp16", "bf16", "fp8_e4m3fn")


def schema(search: str, **fields) -> io.Schema:
    """io.Schema in the pack's category; `search` are further words to find the node by, where ComfyUI knows of them."""
    if "search_aliases" in io.Schema.__dataclass_fields__:  # newer than 0.3.64, which refuses unknown fields
        fields["search_aliases"] = ["wuerstchen", "wurstchen", *search.split(", ")]
    return io.Schema(category=CATEGORY, **fields)


def weight_dtype_input() -> io.Input:
    return io.Combo.Input(
        "weight_dtype",
        options=list(WEIGHT_DTYPES),
        default="default",
        tooltip="What the weights of Stage C and Stage B are kept in; default: what ComfyUI chooses for this device. "
        "fp8_e4m3fn takes a quarter of the memory of fp32, and costs some quality.",
    )


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def sampling_inputs(defaults: SamplingOptions, cfg_tooltip: str) -> list[io.Input]:
    """The inputs that both samplers share, with each stage's defaults."""
    return [
        steps_input(defaults.steps),
        io.Float.Input("cfg", default=defaults.cfg, min=0.0, max=30.0, step=0.1, round=0.01, tooltip=cfg_tooltip),
        io.Combo.Input(
            "sampler",
            options=list(SAMPLERS),
            default=defaults.sampler,
            tooltip="dpmpp_2m_sde and ddpm add fresh noise at every step and draw more varied pictures; dpmpp_2m and "
            "dpmpp_2m_sde need fewer steps.",
        ),
    ]


def steps_input(steps: int) -> io.Input:
    return io.Int.Input(
        "steps", default=steps, min=1, max=1000, tooltip="More steps take longer and help up to a point."
    )


def schedule_input(default: str, optional: bool = False) -> io.Input:
    return io.Combo.Input(
        "schedule",
        options=list(SCHEDULES),
        default=default,
        optional=optional,
        tooltip="How the steps are spaced: uneven spends two thirds of them on the noisiest third.",
    )


def denoise_input() -> io.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="1 starts from pure noise; lower values keep more of the latent, 0 all of it.",
    )


def guidance_inputs() -> list[io.Input]:
    """Where guidance counts, and how strong it leaves the colours."""
    shares = {"min": 0.0, "max": 1.0, "step": 0.01, "optional": True}
    return [
        io.Float.Input(
            "cfg_interval_low",
            default=0.0,
            tooltip="Guidance counts from this time on, 0 (the picture) to 1 (noise); a step without it is twice as "
            "fast.",
            **shares,
        ),
        io.Float.Input("cfg_interval_high", default=1.0, tooltip="Guidance counts up to this time.", **shares),
        io.Float.Input(
            "cfg_rescale",
            default=0.0,
            tooltip="Takes back this share of the contrast that guidance adds: colours get weaker. 0 is off.",
            **shares,
        ),
    ]


def size_inputs(what: str) -> list[io.Int.Input]:
    return [
        io.Int.Input(
            side,
            default=0,
            min=0,
            max=LARGEST_SIDE,
            step=8,
            tooltip=f"{side.capitalize()} of {what} in pixels, a multiple of 8 from {SMALLEST_SIDE}. 0: the model's "
            f"own size, {SMALL.side} x {SMALL.side} for the mini and {RELEASED.side} x {RELEASED.side} for the "
            "released weights.",
        )
        for side in ("width", "height")
    ]


def preview_input() -> io.Input:
    return io.Boolean.Input(
        "preview",
        default=False,
        optional=True,
        tooltip="Shows the picture while it is drawn, even where ComfyUI's own live preview is off.",
    )
