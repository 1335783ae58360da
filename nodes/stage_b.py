from comfy_api.latest import io

from ..wuerstchen_core.pipeline import sample_stage_b
from . import host, latents, sockets


class WuerstchenStageBSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenStageBSampler",
            display_name="Würstchen Stage B Sampler",
            category=sockets.CATEGORY,
            description="Adds the detail: from Stage C's small latent to one of Stage A, the size of the picture / 4.",
            inputs=[
                sockets.StageB.Input("stage_b", tooltip="From Würstchen Load Stage B or Würstchen Load Model."),
                io.Latent.Input(
                    "latent",
                    tooltip="From Würstchen Stage C Sampler, or from Würstchen Semantic Compress to vary a picture.",
                ),
                sockets.seed_input("The same seed gives the same picture; another one, other details."),
                *sockets.sampling_inputs(
                    12, 1.0, "How closely the latent and the prompt are followed. 1 is off, and twice as fast."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The prompt again, by the text encoder of Stage B. It may be left out.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="By the text encoder of Stage B; read where cfg is not 1."
                ),
            ],
            outputs=[io.Latent.Output(tooltip="For Würstchen VQGAN Decode.")],
        )

    @classmethod
    def execute(
        cls, stage_b: host.Model, latent, seed, steps, cfg, sampler, positive=None, negative=None
    ) -> io.NodeOutput:
        samples = latents.samples_of(
            latent,
            stage_b.network.config.semantic_channels,
            "Würstchen Stage B Sampler",
            "Würstchen Stage C Sampler or Würstchen Semantic Compress",
        )
        geometry = latents.geometry_of_stage_c(latent)
        device = stage_b.load()
        sampled = sample_stage_b(
            stage_b.network,
            samples.to(device),
            geometry,
            latents.text_of(positive),
            latents.text_of(negative),
            steps=steps,
            cfg=cfg,
            sampler=sampler,
            seed=seed,
            batch_index=latent.get("batch_index"),
            dtype=stage_b.dtype,
            progress=host.progress(steps),
        )
        return io.NodeOutput(latents.pack(sampled, geometry))
