from comfy_api.latest import io

from ..wuerstchen_core.models.stage_c import StageCConfig
from ..wuerstchen_core.pipeline import preview
from . import host, latents, sockets


class WuerstchenSemanticPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenSemanticPreview",
            display_name="Würstchen Semantic Preview",
            category=sockets.CATEGORY,
            description="Shows a latent of Stage C as a small picture, without running Stage B.",
            inputs=[
                io.Latent.Input("latent", tooltip="From Würstchen Stage C Sampler or Würstchen Semantic Compress."),
                sockets.previewer_input(),
            ],
            outputs=[io.Image.Output(tooltip="Small pictures, 8 pixels per position of the latent.")],
        )

    @classmethod
    def execute(cls, latent, previewer: host.Model | None = None) -> io.NodeOutput:
        samples = latents.samples_of(
            latent,
            StageCConfig().latent_channels,
            "Würstchen Semantic Preview",
            "Würstchen Stage C Sampler or Würstchen Semantic Compress",
        )
        previewer = host.linear_preview() if previewer is None else sockets.network(previewer, "previewer")
        device = previewer.load(host.PREVIEW_MEMORY * samples[:, 0].numel())
        images = preview(previewer.network, samples.to(device), previewer.dtype)
        return io.NodeOutput(host.to_intermediate(images))
