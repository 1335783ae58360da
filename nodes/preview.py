from comfy_api.latest import io

from . import host, latents, sockets
from .stage_c import CHANNELS


class WuerstchenSemanticPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "vae decode, preview latent, small picture",
            node_id="WuerstchenSemanticPreview",
            display_name="Würstchen Semantic Preview",
            description="Shows a latent of Stage C as a small picture, without running Stage B.",
            inputs=[
                io.Latent.Input("latent", tooltip="From a sampler with Stage C, or Würstchen Semantic Compress."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The semantic VAE, from Würstchen Load Model or Würstchen Load Semantic Compressor. "
                    "Without, each position of the latent is one colour, as fits the mini.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="Small pictures, 8 pixels per position of the latent.")],
        )

    @classmethod
    def execute(cls, latent, vae=None) -> io.NodeOutput:
        node = "Würstchen Semantic Preview"
        samples = latents.samples_of(latent, CHANNELS, node, "Würstchen Stage C Sampler or Würstchen Semantic Compress")
        if vae is None:
            return io.NodeOutput(host.loading.linear_preview(samples))
        host.loading.require_semantic(vae, node)
        return io.NodeOutput(vae.decode(samples))
