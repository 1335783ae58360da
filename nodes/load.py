from comfy_api.latest import io

from . import host, sockets


class WuerstchenLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenLoadModel",
            display_name="Würstchen Load Model",
            category=sockets.CATEGORY,
            description="Loads a whole set of Würstchen networks: the mini, or a folder in models/wuerstchen. The "
            "published weights are single files; use the loader of each network for them.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(host.model_sets()),
                    default="mini",
                    tooltip="mini comes with the node pack: emoji at 256 x 256. The others are the folders in "
                    "models/wuerstchen that hold stage_a, stage_b, stage_c, text_encoder and semantic_compressor, all "
                    ".safetensors (text_encoder_b and previewer are optional). ComfyUI's log names the files that a "
                    "folder lacks.",
                )
            ],
            outputs=[
                sockets.TextEncoder.Output(
                    "text_encoder_c", display_name="text encoder (Stage C)", tooltip="The text encoder of Stage C."
                ),
                sockets.StageC.Output(
                    "stage_c",
                    display_name="Stage C",
                    tooltip="Turns text into the small latent that decides the content.",
                ),
                sockets.TextEncoder.Output(
                    "text_encoder_b", display_name="text encoder (Stage B)", tooltip="The text encoder of Stage B."
                ),
                sockets.StageB.Output("stage_b", display_name="Stage B", tooltip="Adds the detail."),
                sockets.StageA.Output(
                    "stage_a", display_name="Stage A", tooltip="The VQGAN: turns latents into pictures and back."
                ),
                sockets.SemanticCompressor.Output(
                    "semantic_compressor",
                    display_name="semantic compressor",
                    tooltip="Turns a picture into the kind of small latent that Stage C makes from text.",
                ),
                sockets.Previewer.Output(
                    "previewer",
                    display_name="previewer",
                    tooltip="Shows Stage C's latents as small pictures; empty if the set has no previewer.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        networks = host.load_set(model)
        return io.NodeOutput(
            networks["text_encoder_c"],
            networks["stage_c"],
            networks.get("text_encoder_b"),
            networks["stage_b"],
            networks["stage_a"],
            networks["semantic_compressor"],
            networks.get("previewer"),
        )


class NetworkLoader(io.ComfyNode):
    """One network from one file; a subclass names the network."""

    KIND: str

    @classmethod
    def schema(cls, name: str, description: str, output: io.Output) -> io.Schema:
        tooltip = f"A file in {host.places(cls.KIND)}. Its layout is recognised from its content."
        return io.Schema(
            node_id=cls.__name__,
            display_name=f"Würstchen Load {name}",
            category=sockets.CATEGORY,
            description=description,
            inputs=[io.Combo.Input("file", options=list(host.weight_files(cls.KIND)), tooltip=tooltip)],
            outputs=[output],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(host.load_network(cls.KIND, file))


class WuerstchenLoadStageA(NetworkLoader):
    KIND = "stage_a"

    @classmethod
    def define_schema(cls):
        return cls.schema(
            "Stage A",
            "Loads Stage A, the VQGAN. v1, v2 and Stable Cascade share the same one.",
            sockets.StageA.Output(
                display_name="Stage A", tooltip="For Würstchen VQGAN Decode and Würstchen VQGAN Encode."
            ),
        )


class WuerstchenLoadStageB(NetworkLoader):
    KIND = "stage_b"

    @classmethod
    def define_schema(cls):
        return cls.schema(
            "Stage B",
            "Loads Stage B, which adds the detail. Its text encoder is CLIP H.",
            sockets.StageB.Output(display_name="Stage B", tooltip="For Würstchen Stage B Sampler."),
        )


class WuerstchenLoadStageC(NetworkLoader):
    KIND = "stage_c"

    @classmethod
    def define_schema(cls):
        return cls.schema(
            "Stage C",
            "Loads Stage C, which draws the content. Its text encoder is CLIP bigG in v2, CLIP H in v1.",
            sockets.StageC.Output(display_name="Stage C", tooltip="For Würstchen Stage C Sampler."),
        )


class WuerstchenLoadTextEncoder(NetworkLoader):
    KIND = "text_encoder"

    @classmethod
    def define_schema(cls):
        return cls.schema(
            "Text Encoder",
            "Loads the text encoder of a CLIP model. v2's Stage C was trained with CLIP bigG (width 1280; SDXL's "
            "clip_g.safetensors is one), Stage B and v1's Stage C with CLIP H (width 1024): use this node twice.",
            sockets.TextEncoder.Output(
                display_name="text encoder",
                tooltip="For Würstchen Text Encode: bigG for the prompts of v2's Stage C, H for those of Stage B.",
            ),
        )


class WuerstchenLoadSemanticCompressor(NetworkLoader):
    KIND = "semantic_compressor"

    @classmethod
    def define_schema(cls):
        return cls.schema(
            "Semantic Compressor",
            "Loads the semantic compressor. v2's is in the authors' Stage B file, model_v2_stage_b.pt.",
            sockets.SemanticCompressor.Output(
                display_name="semantic compressor", tooltip="For Würstchen Semantic Compress."
            ),
        )


class WuerstchenLoadPreviewer(NetworkLoader):
    KIND = "previewer"

    @classmethod
    def define_schema(cls):
        return cls.schema(
            "Previewer",
            "Loads a previewer, which shows Stage C's latents as small pictures. None has been published: train one.",
            sockets.Previewer.Output(
                display_name="previewer", tooltip="For Würstchen Semantic Preview and Würstchen Stage C Sampler."
            ),
        )
