import torch
from comfy_api.latest import io

from ..wuerstchen_core import WuerstchenError, apply_loras
from ..wuerstchen_core.diffusion.schedule import SCHEDULES
from ..wuerstchen_core.models.stage_c import StageCConfig
from ..wuerstchen_core.pipeline import sample_stage_c
from . import host, latents, sockets
from .conditioning import text_of, token_count

# Peak memory of the released Stage C in numbers per position of its latent and per token of its text.
NUMBERS_PER_POSITION, NUMBERS_PER_TOKEN = 20_000, 120_000


class WuerstchenEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenEmptyLatent",
            display_name="Würstchen Empty Latent",
            category=sockets.CATEGORY,
            description="Sets the size and the number of pictures when Stage C starts from text alone.",
            inputs=[
                *sockets.size_inputs("the pictures"),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures are drawn at once."),
            ],
            outputs=[io.Latent.Output(tooltip="A latent of Stage C.")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        geometry = latents.picture_size(width, height)
        if batch_size < 1:
            raise WuerstchenError(f"batch_size is {batch_size}: at least 1 is needed")
        empty = torch.zeros(batch_size, StageCConfig().latent_channels, *geometry.stage_c)
        return io.NodeOutput(latents.pack(empty, geometry))


class WuerstchenStageCSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenStageCSampler",
            display_name="Würstchen Stage C Sampler",
            category=sockets.CATEGORY,
            description="Draws the content: turns text into a small latent, starting from noise or from a "
            "picture's latent.",
            inputs=[
                sockets.StageC.Input(
                    "stage_c", tooltip="From Würstchen Load Stage C, Würstchen Load Model or Würstchen Load LoRA."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What the picture shows, from the text encoder of Stage C. Areas, masks, strengths, "
                    "timestep ranges and several entries are refused; join texts with Conditioning Concat.",
                ),
                io.Conditioning.Input("negative", tooltip="What to avoid; an empty text will do."),
                io.Latent.Input(
                    "latent",
                    tooltip="From Würstchen Empty Latent, or from Würstchen Semantic Compress to start from a picture. "
                    "With a noise mask, only the masked part is drawn.",
                ),
                sockets.seed_input("The same seed gives the same picture."),
                *sockets.sampling_inputs(
                    30,
                    4.0,
                    "How closely the prompt is followed. 1 turns guidance off: faster, and the negative has no effect.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="even",
                    tooltip="How the steps are spaced: uneven spends two thirds of them on the noisiest third.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts from pure noise; lower values keep more of the latent, 0 all of it.",
                ),
                sockets.previewer_input(),
            ],
            outputs=[io.Latent.Output(tooltip="For Würstchen Stage B Sampler.")],
        )

    @classmethod
    def execute(
        cls,
        stage_c: host.Model,
        positive,
        negative,
        latent,
        seed,
        steps,
        cfg,
        sampler,
        schedule,
        denoise,
        previewer: host.Model | None = None,
    ) -> io.NodeOutput:
        stage_c = sockets.network(stage_c, "stage_c")
        previewer = host.linear_preview() if previewer is None else sockets.network(previewer, "previewer")
        samples = latents.samples_of(
            latent,
            stage_c.network.config.latent_channels,
            "Würstchen Stage C Sampler",
            "Würstchen Empty Latent or Würstchen Semantic Compress",
        )
        geometry = latents.geometry_of_stage_c(latent)
        batch, width = len(samples), stage_c.network.config.text_width
        positive = text_of(() if positive is None else positive, "positive", "Stage C", width, batch)
        negative = text_of(negative, "negative", "Stage C", width, batch)
        progress = host.progress(steps, previewer)
        numbers = samples[0, 0].numel() * NUMBERS_PER_POSITION + token_count(positive, negative) * NUMBERS_PER_TOKEN
        device = stage_c.load(numbers * batch * (1 if cfg == 1 else 2) * stage_c.dtype.itemsize)
        mask = latents.mask_of(latent, geometry)
        with apply_loras(stage_c.network, stage_c.loras):
            sampled = sample_stage_c(
                stage_c.network,
                samples.to(device),
                positive,
                negative,
                steps=steps,
                cfg=cfg,
                sampler=sampler,
                schedule=schedule,
                denoise=denoise,
                seed=seed,
                mask=None if mask is None else mask.to(device),
                batch_index=latent.get("batch_index"),
                dtype=stage_c.dtype,
                progress=progress,
            )
        return io.NodeOutput(latents.pack(sampled, geometry, like={**latent, latents.DRAWN: latent.get("noise_mask")}))
