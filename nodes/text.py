from comfy_api.latest import io

from ..wuerstchen_core import WuerstchenError
from . import host, sockets

NUMBERS_PER_TOKEN = 20  # peak memory, as a multiple of the text encoder's width


class WuerstchenTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenTextEncode",
            display_name="Würstchen Text Encode",
            category=sockets.CATEGORY,
            description="Encodes a prompt for Stage C or Stage B; each has its own text encoder.",
            inputs=[
                sockets.TextEncoder.Input(
                    "text_encoder", tooltip="The text encoder of the stage that the prompt is for."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What the picture shows or, as a negative prompt, what to avoid. (word:1.2) stresses "
                    "a word. The text may be of any length.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the positive or the negative input of the sampler.")],
        )

    @classmethod
    def execute(cls, text_encoder: host.Model, text: str) -> io.NodeOutput:
        text_encoder = sockets.network(text_encoder, "text_encoder")
        if not isinstance(text, str):
            raise WuerstchenError(f"text: expected a text, got {type(text).__name__}")
        tokens = text_encoder.network.config.context_length + len(text)  # at most, in any but its last chunk
        numbers = NUMBERS_PER_TOKEN * text_encoder.network.config.width * tokens
        text_encoder.load(numbers * text_encoder.dtype.itemsize)
        encoded = host.to_intermediate(text_encoder.network([text]))
        return io.NodeOutput([[encoded, {}]])
