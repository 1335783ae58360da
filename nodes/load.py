from comfy_api.latest import io

from . import host, sockets


class WuerstchenLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenLoadModel",
            display_name="Würstchen Load Model",
            category=sockets.CATEGORY,
            description="Loads a whole set of Würstchen networks.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(host.model_sets()),
                    default="mini",
                    tooltip="mini is in the node pack: emoji at 256 x 256. Others are folders of models/wuerstchen "
                    "that hold a whole set of weights.",
                )
            ],
            outputs=[
                sockets.TextEncoder.Output(
                    "text_encoder_c", display_name="text encoder (Stage C)", tooltip="The text encoder of Stage C."
                ),
                sockets.StageC.Output(
                    "stage_c", display_name="Stage C", tooltip="Text to the small latent that decides the content."
                ),
                sockets.TextEncoder.Output(
                    "text_encoder_b", display_name="text encoder (Stage B)", tooltip="The text encoder of Stage B."
                ),
                sockets.StageB.Output("stage_b", display_name="Stage B", tooltip="Adds the detail."),
                sockets.StageA.Output("stage_a", display_name="Stage A", tooltip="The VQGAN: latent and picture."),
                sockets.SemanticCompressor.Output(
                    "semantic_compressor",
                    display_name="semantic compressor",
                    tooltip="Picture to the small latent that Stage C makes from text.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        networks = host.load_set(model)
        return io.NodeOutput(
            networks["text_encoder_c"],
            networks["stage_c"],
            networks["text_encoder_b"],
            networks["stage_b"],
            networks["stage_a"],
            networks["semantic_compressor"],
        )
