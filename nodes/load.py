from comfy_api.latest import io

from . import host, sockets


class WuerstchenLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "load checkpoint, checkpoint loader, mini",
            node_id="WuerstchenLoadModel",
            display_name="Würstchen Load Model",
            description="Loads a whole set of Würstchen networks: the mini, or a folder or a bundle in "
            "models/wuerstchen. The published weights are single files; use the loader of each network for them.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(host.folders.model_sets()),
                    default="mini",
                    tooltip="mini comes with the node pack: emoji at 256 x 256. The others are the folders in "
                    "models/wuerstchen that hold stage_a, stage_b, stage_c, text_encoder and semantic_compressor, all "
                    ".safetensors (text_encoder_b and previewer are optional), and the bundles there: one file with "
                    "all of them, as wuerstchen convert --bundle writes it. ComfyUI's log names what a set lacks.",
                ),
                sockets.weight_dtype_input(),
            ],
            outputs=[
                io.Model.Output(
                    "stage_c",
                    display_name="Stage C",
                    tooltip="Turns text into the small latent that decides the content.",
                ),
                io.Clip.Output(
                    "clip_c", display_name="CLIP (Stage C)", tooltip="The text encoder for Stage C's prompts."
                ),
                io.Model.Output("stage_b", display_name="Stage B", tooltip="Adds the detail."),
                io.Clip.Output(
                    "clip_b", display_name="CLIP (Stage B)", tooltip="The text encoder for Stage B's prompts."
                ),
                io.Vae.Output(
                    "stage_a", display_name="Stage A", tooltip="The VQGAN: Stage B's latent and the picture."
                ),
                io.Vae.Output(
                    "semantic",
                    display_name="semantic VAE",
                    tooltip="Picture to the small latent that Stage C draws, and that to a small preview.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model, **others):
        return host.fingerprints.of_set(model)

    @classmethod
    def validate_inputs(cls, model=None):
        return host.folders.what_is_missing_in_set(model)

    @classmethod
    def execute(cls, model: str, weight_dtype: str = "default") -> io.NodeOutput:
        return io.NodeOutput(*host.loading.load_set(model, weight_dtype))


class FileLoader(io.ComfyNode):
    """One network from one file; a subclass names its kind."""

    KIND: str
    SEARCH: str  # words to find the node by

    @classmethod
    def schema(cls, name: str, description: str, output: io.Output, *more: io.Input) -> io.Schema:
        return sockets.schema(
            cls.SEARCH,
            node_id=cls.__name__,
            display_name=f"Würstchen Load {name}",
            description=description,
            inputs=[file_input("file", cls.KIND), *more],
            outputs=[output],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **others):
        return host.fingerprints.of_files(**{cls.KIND: file})

    @classmethod
    def validate_inputs(cls, file=None):
        """Says before a run what ComfyUI would call a value not in the list."""
        return host.folders.what_is_missing(**{cls.KIND: file})


def file_input(name: str, kind: str) -> io.Input:
    return io.Combo.Input(
        name,
        options=list(host.folders.weight_files(kind)),
        tooltip=f"A file in {host.folders.places(kind)}. Its layout is recognised from its content.",
    )


class WuerstchenLoadStageA(FileLoader):
    KIND = "stage_a"
    SEARCH = "vae loader, vqgan, cascade"

    @classmethod
    def define_schema(cls):
        return cls.schema(
            "Stage A",
            "Loads Stage A, the VQGAN. v1, v2 and Stable Cascade share the same one, which Load VAE takes too.",
            io.Vae.Output(display_name="Stage A", tooltip="For Würstchen VQGAN Decode, VAE Decode and VAE Encode."),
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(host.loading.load_stage_a(file))


class DiffusionLoader(FileLoader):
    @classmethod
    def execute(cls, file: str, weight_dtype: str = "default") -> io.NodeOutput:
        return io.NodeOutput(host.loading.load_stage(cls.KIND, file, weight_dtype))


class WuerstchenLoadStageB(DiffusionLoader):
    KIND = "stage_b"
    SEARCH = "unet loader, diffusion model, decoder, cascade"

    @classmethod
    def define_schema(cls):
        return cls.schema(
            "Stage B",
            "Loads Stage B, which adds the detail. Its text encoder is CLIP H.",
            io.Model.Output(
                display_name="Stage B",
                tooltip="For Würstchen Stage B Sampler, or for any sampler behind Würstchen Stage B Conditioning.",
            ),
            sockets.weight_dtype_input(),
        )


class WuerstchenLoadStageC(DiffusionLoader):
    KIND = "stage_c"
    SEARCH = "unet loader, diffusion model, prior, cascade"

    @classmethod
    def define_schema(cls):
        return cls.schema(
            "Stage C",
            "Loads Stage C, which draws the content. Its text encoder is CLIP bigG in v2, CLIP H in v1.",
            io.Model.Output(display_name="Stage C", tooltip="For Würstchen Stage C Sampler, or any other sampler."),
            sockets.weight_dtype_input(),
        )


class WuerstchenLoadTextEncoder(FileLoader):
    KIND = "text_encoder"
    SEARCH = "clip loader, bigg, cascade"

    @classmethod
    def define_schema(cls):
        return cls.schema(
            "Text Encoder",
            "Loads the text encoder of a CLIP model. v2's Stage C was trained with CLIP bigG (width 1280; SDXL's "
            "clip_g.safetensors is one), Stage B and v1's Stage C with CLIP H (width 1024): use this node twice.",
            io.Clip.Output(
                display_name="CLIP",
                tooltip="For prompts: bigG for those of v2's Stage C, H for those of Stage B.",
            ),
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(host.loading.load_text_encoder(file))


class WuerstchenLoadSemanticCompressor(FileLoader):
    KIND = "semantic_compressor"
    SEARCH = "vae loader, effnet, efficientnet, img2img, previewer"
    LINEAR = "none: one colour a position"

    @classmethod
    def define_schema(cls):
        return cls.schema(
            "Semantic Compressor",
            "Loads the semantic compressor. v2's is in the authors' Stage B file, model_v2_stage_b.pt.",
            io.Vae.Output(
                display_name="semantic VAE",
                tooltip="For Würstchen Semantic Compress and Preview; VAE Encode and VAE Decode do the same.",
            ),
            io.Combo.Input(
                "previewer",
                options=[cls.LINEAR, *host.folders.weight_files("previewer")],
                default=cls.LINEAR,
                optional=True,
                tooltip=f"What shows latents as small pictures: a file in {host.folders.places('previewer')}. None is "
                "published: train one.",
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, file, previewer=None, **others):
        return host.fingerprints.of_files(semantic_compressor=file, previewer=cls._named(previewer))

    @classmethod
    def validate_inputs(cls, file=None, previewer=None):
        return host.folders.what_is_missing(semantic_compressor=file, previewer=cls._named(previewer))

    @classmethod
    def execute(cls, file: str, previewer: str | None = None) -> io.NodeOutput:
        return io.NodeOutput(host.loading.load_semantic(file, cls._named(previewer)))

    @classmethod
    def _named(cls, previewer: str | None) -> str | None:
        return None if previewer == cls.LINEAR else previewer
