"""Stage C and Stage B as ComfyUI's MODEL: its samplers, guiders, LoRAs, hooks and memory management work on them."""

import math
from collections.abc import Callable

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension as extension
import comfy.supported_models_base
import torch
import torch.nn.functional as F
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...wuerstchen_core import WuerstchenError, tiling
from ...wuerstchen_core.checkpoints.load import METADATA_KEY, header_tensor, load_network, load_previewer
from ...wuerstchen_core.checkpoints.sets import LINEAR_PREVIEW
from ...wuerstchen_core.models.defaults import Defaults, defaults_of
from ...wuerstchen_core.models.stage_b import DiffNeXt
from ...wuerstchen_core.models.stage_c import Prior
from ...wuerstchen_core.util.finite import is_finite
from ..latents import OPEN, SEMANTIC, SIZE_IT, numbers_of
from . import masks
from .conditions import CONDMemory, CONDSemantic, Memory, margin, padded, remembered
from .lora import fits
from .overflow import in_wide_enough
from .previews import Previewer, with_previews
from .schedule import CosineSampling
from .unet import UNetConfig, WeightName, refuse_unread, replacements

KEY = "wuerstchen"
TIME = "wuerstchen_time"  # in transformer_options: the time of a step where its sigma alone does not tell it
FORGET = "wuerstchen_forget"  # in transformer_options: each step's conditioning may be another one

CHUNK = 77  # tokens of a text, at least
COMPUTED_IN = [torch.bfloat16, torch.float16, torch.float32]
WEIGHT_DTYPES = {
    "default": None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}


class Hosted:
    """What ComfyUI calls a network by. All that a run does not change comes in as `condition`."""

    dtype: torch.dtype  # of the weights, as they are stored
    hosted: Callable

    def forward(self, x, t, context=None, control=None, transformer_options={}, condition=None, **kwargs):  # noqa: B006
        if control is not None:
            raise WuerstchenError("there are no ControlNets for Würstchen: take it out of the conditioning")
        wrappers = extension.get_all_wrappers(extension.WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = extension.WrapperExecutor.new_class_executor(self.hosted, self, wrappers)
        return executor.execute(x, t, condition, transformer_options)


class HostedPrior(Hosted, Prior):
    """Stage C. It has one attention that guidance nodes can replace: that of the block in its middle."""

    def hosted(self, x, t, condition, transformer_options):
        replace = replacements(transformer_options, known=("attn1", ("middle", 0)))
        if replace is None:
            return self.denoise(x, self.modulate(t, x.dtype), condition)
        attention = self.blocks[3 * (self.config.depth // 2) + 2].attention

        def replaced(_, inputs, __):
            tokens = inputs[0]
            width = tokens.shape[-1] // attention.heads
            options = {**transformer_options, "n_heads": attention.heads, "dim_head": width, "attn_precision": None}
            projections = (attention.to_q(tokens), attention.to_k(tokens), attention.to_v(tokens))
            return attention.to_out[0](replace(*projections, options))

        hook = attention.register_forward_hook(replaced)
        try:
            return self.denoise(x, self.modulate(t, x.dtype), condition)
        finally:
            hook.remove()


class HostedDiffNeXt(Hosted, DiffNeXt):
    """Stage B. A latent of any size is worked on in the middle of the next one that the network can take."""

    def hosted(self, x, t, condition, transformer_options):
        replacements(transformer_options)
        (rows, columns), sides = x.shape[-2:], []
        for side in (columns, rows):
            sides += [margin(side), padded(side) - side - margin(side)]
        if any(sides):
            x = F.pad(x, sides, mode="replicate")
        noise = self.denoise(x, self.modulate(t, x.dtype), condition)
        return noise[..., sides[2] : sides[2] + rows, sides[0] : sides[0] + columns]


class AnyChannels(int):
    """A latent's number of channels. ComfyUI repeats an empty latent of another number's, whose size is wrong as well;
    where no number differs from this one it comes as it is, to be refused."""

    def __ne__(self, other):
        return False

    __hash__ = int.__hash__


class StageCLatent(comfy.latent_formats.LatentFormat):
    """Shown by a previewer, or else each position as one colour."""

    latent_channels = AnyChannels(16)
    spacial_downscale_ratio = 128 / 3  # read by newer versions of ComfyUI

    def __init__(self):
        self.previewer: Previewer | None = None
        linear = load_previewer(LINEAR_PREVIEW).layers[0]
        self.factors = (2 * linear.weight[:, :, 0, 0]).T.tolist()
        self.latent_rgb_factors_bias = (2 * linear.bias - 1).tolist()

    @property
    def latent_rgb_factors(self):
        return None if self.previewer_shows else self.factors

    @property
    def previewer_shows(self) -> bool:
        return self.previewer is not None and args.preview_method in (
            LatentPreviewMethod.Auto,
            LatentPreviewMethod.TAESD,
        )


class StageBLatent(comfy.latent_formats.LatentFormat):
    """Outside of the sampler latents are Stage A's own, within it they are divided by its scale factor."""

    latent_channels = AnyChannels(4)
    spacial_downscale_ratio = 4
    previewer_shows = False


class Config(comfy.supported_models_base.BASE):
    unet_config = UNetConfig(disable_unet_model_creation=True)
    unet_extra_config: dict = {}
    sampling_settings = {"shift": 1.0}
    text_encoder_key_prefix = ["text_encoders."]


class StageCConfig(Config):
    latent_format = StageCLatent


class StageBConfig(Config):
    latent_format = StageBLatent


class Wuerstchen(comfy.model_base.BaseModel):
    """A diffusion network in ComfyUI's hands; a subclass names its stage."""

    STAGE: str
    AREA: float  # positions of the latent to an eighth of a pixel, in which ComfyUI's areas are given
    SOURCES: str  # of latents
    NUMBERS_PER_POSITION: int  # peak memory of the released network, for each picture
    NUMBERS_PER_TOKEN: int

    diffusion_model: HostedPrior | HostedDiffNeXt

    def __init__(self, config, network, stored: torch.dtype, computed: torch.dtype | None, device):
        config.set_inference_dtype(stored, computed)
        super().__init__(config, comfy.model_base.ModelType.EPS, device=device)
        network.dtype = stored
        self.diffusion_model = network
        self.model_sampling = CosineSampling(config)

    def process_timestep(self, timestep, time=None, **kwargs):
        """The times of the host's schedule -> those that the network is told."""
        if time is not None:
            return torch.full_like(timestep, time)
        sampling = self.model_sampling
        return sampling.network_time(timestep) if isinstance(sampling, CosineSampling) else timestep

    def memory_required(self, input_shape, cond_shapes={}):  # noqa: B006
        """Bytes beside the weights that a step takes, as measured at the released sizes."""
        tokens = max([CHUNK, *(shape[1] for shape in cond_shapes.get("c_crossattn", ()))])
        numbers = math.prod(input_shape[2:]) * self.NUMBERS_PER_POSITION + tokens * self.NUMBERS_PER_TOKEN
        return input_shape[0] * numbers * (self.manual_cast_dtype or self.get_dtype()).itemsize

    def extra_conds_shapes(self, cross_attn=None, **kwargs):
        return {} if cross_attn is None else {"c_crossattn": list(cross_attn.shape)}

    def state_dict(self, *inputs, **options):
        state = super().state_dict(*inputs, **options)
        for name in list(state):
            state[WeightName(name)] = state.pop(name)
        return state

    def state_dict_for_saving(self, *others, **more):
        """ComfyUI's savers write no metadata of ours."""
        state = super().state_dict_for_saving(*others, **more)
        state[f"model.diffusion_model.{METADATA_KEY}"] = header_tensor(self.diffusion_model)
        return state

    def check(self, noise: Tensor, text: Tensor | None) -> None:
        """Raises WuerstchenError for a latent or a text that belongs to another network."""
        config = self.diffusion_model.config
        if noise.dim() != 4 or noise.shape[1] != config.latent_channels:
            raise WuerstchenError(
                f"{self.STAGE} takes a latent of {config.latent_channels} channels, this one is "
                f"{'x'.join(map(str, noise.shape[1:]))}: take it from {self.SOURCES}"
            )
        if text is not None and text.shape[-1] != config.text_width:
            raise WuerstchenError(
                f"{self.STAGE} was trained with a text encoder of width {config.text_width}, but this text comes from "
                f"one of width {text.shape[-1]}: encode it with the CLIP that belongs to {self.STAGE}"
            )
        if text is not None and not is_finite(text):
            raise WuerstchenError(f"the text for {self.STAGE} is not finite: run its text encoder in float32")

    def _apply_model(
        self,
        x,
        t,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options={},  # noqa: B006
        memory: tuple[Memory, ...] = (),
        **inputs,
    ):
        dtype = self.manual_cast_dtype or self.get_dtype()
        text = None if c_crossattn is None else c_crossattn.to(x.device, dtype)

        def compute():
            return self.condition(x, dtype, text, **inputs)

        hooked = self.current_patcher is not None and self.current_patcher.current_hooks is not None
        if hooked or transformer_options.get(FORGET) or not memory:  # hooks change weights from step to step
            condition = compute()
        else:
            condition = remembered(memory, (x, text, *inputs.values(), dtype, x.device), compute)
        return super()._apply_model(
            x,
            t,
            None,
            c_crossattn,
            control,
            transformer_options,
            condition=condition,
            time=transformer_options.get(TIME),
        )


class StageC(Wuerstchen):
    STAGE, AREA = "Stage C", 8 * 3 / 128
    SOURCES = "Würstchen Empty Latent or Würstchen Semantic Compress"
    diffusion_model: HostedPrior
    NUMBERS_PER_POSITION, NUMBERS_PER_TOKEN = 17_000, 120_000

    def extra_conds(self, noise=None, cross_attn=None, **kwargs):
        refuse_unread(kwargs)
        if kwargs.get(SEMANTIC) is not None:
            raise WuerstchenError(
                "this conditioning comes from Würstchen Stage B Conditioning, and this sampler has Stage C: take the "
                "prompt from Würstchen Text Encode or CLIP Text Encode"
            )
        self.check(noise, cross_attn)
        if tuple(noise.shape[-2:]) == OPEN:
            raise WuerstchenError(f"the latent for Stage C has no size yet: {SIZE_IT}")
        if cross_attn is None:
            raise WuerstchenError("Stage C draws what a text says: it needs one, if only an empty one")
        return {"c_crossattn": comfy.conds.CONDCrossAttn(cross_attn), "memory": CONDMemory()}

    def condition(self, x, dtype, text):
        return self.diffusion_model.condition(text)


class StageB(Wuerstchen):
    STAGE, AREA = "Stage B", 8 / 4
    SOURCES = "Würstchen Stage B Conditioning or Würstchen VQGAN Encode"
    diffusion_model: HostedDiffNeXt
    NUMBERS_PER_POSITION, NUMBERS_PER_TOKEN = 750, 210_000

    def extra_conds(self, noise=None, cross_attn=None, prompt_type="", latent_image=None, **kwargs):
        refuse_unread(kwargs)
        text = None if cross_attn is None or cross_attn.shape[-1] == 0 else cross_attn
        self.check(noise, text)
        network, semantic = self.diffusion_model, kwargs.get(SEMANTIC)
        size = tuple(noise.shape[-2:])
        expected = [math.ceil(padded(side) * 3 / 32) for side in size]
        if semantic is not None:
            semantic = self.of_pictures(semantic, noise, latent_image)
            if max(abs(ours - theirs) for ours, theirs in zip(expected, semantic.shape[-2:], strict=True)) > 1:
                raise WuerstchenError(
                    f"Stage B's latent of {size[1]}x{size[0]} does not fit Stage C's of {semantic.shape[-1]}x"
                    f"{semantic.shape[-2]}: take it from Würstchen Stage B Conditioning"
                )
            features = network.config.latent_space.to_features(semantic.float())
        elif prompt_type == "positive":
            raise WuerstchenError(
                "Stage B draws the picture of a latent of Stage C, which is missing: put Würstchen Stage B "
                "Conditioning between the prompt and the sampler"
            )
        else:
            features = torch.zeros(1, network.config.semantic_channels, *expected)
        conds = {"semantic": CONDSemantic(features.to(noise.device), size), "memory": CONDMemory()}
        if text is not None:
            conds["c_crossattn"] = comfy.conds.CONDCrossAttn(text)
        return conds

    def of_pictures(self, semantic: Tensor, noise: Tensor, latent: Tensor | None) -> Tensor:
        """Stage C's latents -> those of the pictures that the sampler is given, in their order."""
        if len(semantic) == 1:
            return semantic
        numbers = None if latent is None else numbers_of(latent / self.latent_format.scale_factor)
        if numbers is None:
            if len(noise) % len(semantic):
                raise WuerstchenError(
                    f"Stage B's latent holds {len(noise)} pictures, and Würstchen Stage B Conditioning was given "
                    f"{len(semantic)}: give that node as many as the sampler"
                )
            return semantic
        if max(numbers) >= len(semantic):
            raise WuerstchenError(
                f"Stage B's latent holds picture {max(numbers) + 1} of another batch than its conditioning, which has "
                f"{len(semantic)}: take both from the same Würstchen Stage B Conditioning"
            )
        return semantic[numbers]

    def condition(self, x, dtype, text, semantic):
        size = [padded(side) for side in x.shape[-2:]]
        window = tiling.attention_window(*size)
        return self.diffusion_model.condition(semantic.to(x.device, dtype), text, size, window)


class StagePatcher(ModelPatcher):
    """Refuses merges and LoRAs of another network, which ComfyUI leaves out with a line in its log at most."""

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        for key, patch in patches.items():
            name = key if isinstance(key, str) else key[0]
            if name.startswith("diffusion_model.") and not fits(patch, self.model, name):  # others are the CLIP's
                raise WuerstchenError(
                    f"what is to be merged into {self.model.STAGE}, or the LoRA for it, belongs to another network: "
                    f"{name.removeprefix('diffusion_model.')} is not there, or of another size"
                )
        return super().add_patches(patches, strength_patch, strength_model)


STAGES = {
    "stage_c": (HostedPrior, StageCConfig, StageC),
    "stage_b": (HostedDiffNeXt, StageBConfig, StageB),
}


def load_diffusion(kind: str, path, weight_dtype: str = "default") -> ModelPatcher:
    """Stage C or Stage B as a MODEL. Raises WuerstchenError as the core's loaders do."""
    device, offload = management.get_torch_device(), management.unet_offload_device()
    stored = WEIGHT_DTYPES[weight_dtype] or management.unet_dtype(device=device, supported_dtypes=COMPUTED_IN)
    computed = management.unet_manual_cast(stored, device, COMPUTED_IN)
    operations = comfy.ops.pick_operations(stored, computed)
    network_class, config_class, model_class = STAGES[kind]
    network = load_network(kind, path, offload, stored, network=network_class, operations=operations)
    model = model_class(config_class(Config.unet_config), network, stored, computed, offload)
    if kind == "stage_b":
        model.latent_format.scale_factor = 1 / network.config.stage_a_scale
    patcher = StagePatcher(model, device, offload)
    patcher.add_wrapper_with_key(extension.WrappersMP.OUTER_SAMPLE, KEY, _sample)
    return patcher


def require(model: ModelPatcher, kind: str | None, node: str) -> None:
    """Raises WuerstchenError if a MODEL is not the stage that the node is for, or, without a kind, not one of ours."""
    given = getattr(model, "model", model)
    wanted = STAGES[kind][2] if kind else Wuerstchen
    if not isinstance(given, wanted):
        what = (
            f"Würstchen's {given.STAGE}" if isinstance(given, Wuerstchen) else f"another model ({type(given).__name__})"
        )
        stage = f"Würstchen's {wanted.STAGE}" if kind else "Stage C or Stage B of Würstchen"
        loader = f"Würstchen Load {wanted.STAGE}" if kind else "a loader of Würstchen's"
        raise WuerstchenError(
            f"{node} is for {stage}, and this is {what}: take the MODEL from Würstchen Load Model or {loader}"
        )


def defaults(model: ModelPatcher, node: str) -> Defaults:
    """What suits a Stage C. Raises WuerstchenError as `require` does."""
    require(model, "stage_c", node)
    return defaults_of(model.model.diffusion_model.config)


def _sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *more, **options):
    """Around every run of a sampler: ComfyUI's own assumptions put right, and results that are not finite refused."""
    guider = executor.class_obj
    model = guider.model_patcher.model
    sampling = guider.model_patcher.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.StableCascadeSampling):
        raise WuerstchenError(
            f"a node before the sampler sets the noise schedule of another kind of model: {model.STAGE} has a cosine "
            "schedule, which of the ModelSampling nodes only ModelSamplingStableCascade keeps"
        )
    for entries in guider.conds.values():
        for entry in entries:
            if "area" in entry:
                entry["area"] = _area(entry["area"], model.AREA, noise.shape[2:])
    if "model_function_wrapper" in guider.model_options:
        guider.model_options.setdefault("transformer_options", {})[FORGET] = True
    if callback is not None and model.latent_format.previewer_shows:
        callback = with_previews(callback, model.latent_format.previewer, len(sigmas) - 1)

    def run(callback):
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, *more, **options)

    sampled = in_wide_enough(guider, run, callback)
    if not is_finite(sampled):
        raise WuerstchenError(
            f"{model.STAGE} gave values that are not finite: take another sampler or scheduler, or run it in a wider "
            "precision (weight_dtype, or ModelComputeDtype float32)"
        )
    if isinstance(model, StageC):
        masks.note(sampled, denoise_mask)
    return sampled


def _area(area: tuple, factor: float, size) -> tuple:
    """(height, width, y, x) in eighths of pixels, or "percentage" and shares -> in positions of a latent of this size.

    One that would lie outside, or be of no size, becomes a position at the edge.
    """
    factors = [factor, factor]
    if area[0] == "percentage":
        area, factors = area[1:], size
    corner = [min(round(at * by), side - 1) for at, by, side in zip(area[2:], factors, size, strict=True)]
    sides = [
        max(1, min(round(length * by), side - start))
        for length, by, start, side in zip(area[:2], factors, corner, size, strict=True)
    ]
    return (*sides, *corner)
