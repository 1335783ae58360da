import math

from comfy_api.latest import io

from ..wuerstchen_core import Geometry
from ..wuerstchen_core.pipeline import sample_stage_b
from . import host, latents, sockets
from .conditioning import text_of, token_count

# Peak memory of the released Stage B in numbers per position of its latent and per token of its text.
NUMBERS_PER_POSITION, NUMBERS_PER_TOKEN = 1_200, 210_000


class WuerstchenStageBSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenStageBSampler",
            display_name="Würstchen Stage B Sampler",
            category=sockets.CATEGORY,
            description="Adds the detail: turns Stage C's small latent into one of Stage A, 4 times smaller "
            "a side than the picture.",
            inputs=[
                sockets.StageB.Input("stage_b", tooltip="From Würstchen Load Stage B or Würstchen Load Model."),
                io.Latent.Input(
                    "latent",
                    tooltip="From Würstchen Stage C Sampler, or from Würstchen Semantic Compress to vary a picture.",
                ),
                sockets.seed_input("The same seed gives the same picture; another seed changes the details."),
                *sockets.sampling_inputs(
                    12,
                    1.0,
                    "How closely the latent and the prompt are followed. 1 turns guidance off and is twice as fast.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The prompt again, from the text encoder of Stage B; optional. Areas, masks, strengths, "
                    "timestep ranges and several entries are refused.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="From the text encoder of Stage B; used unless cfg is 1."
                ),
            ],
            outputs=[io.Latent.Output(tooltip="For Würstchen VQGAN Decode.")],
        )

    @classmethod
    def execute(
        cls, stage_b: host.Model, latent, seed, steps, cfg, sampler, positive=None, negative=None
    ) -> io.NodeOutput:
        stage_b = sockets.network(stage_b, "stage_b")
        samples = latents.samples_of(
            latent,
            stage_b.network.config.semantic_channels,
            "Würstchen Stage B Sampler",
            "Würstchen Stage C Sampler or Würstchen Semantic Compress",
        )
        latents.refuse_mask(latent, "Würstchen Stage B Sampler")
        geometry = latents.geometry_of_stage_c(latent)
        work = Geometry.of_stage_c(*samples.shape[-2:])
        batch, width = len(samples), stage_b.network.config.text_width
        positive = text_of(positive, "positive", "Stage B", width, batch)
        negative = text_of(negative, "negative", "Stage B", width, batch)
        numbers = math.prod(work.stage_a) * NUMBERS_PER_POSITION + token_count(positive, negative) * NUMBERS_PER_TOKEN
        device = stage_b.load(numbers * batch * (1 if cfg == 1 else 2) * stage_b.dtype.itemsize)
        sampled = sample_stage_b(
            stage_b.network,
            samples.to(device),
            work,
            positive,
            negative,
            steps=steps,
            cfg=cfg,
            sampler=sampler,
            seed=seed,
            batch_index=latent.get("batch_index"),
            dtype=stage_b.dtype,
            progress=host.progress(steps),
        )
        return io.NodeOutput(latents.pack(sampled, geometry))
