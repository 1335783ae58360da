"""The released files that a graph may ask for: where each comes from, and what it is to be called."""

from typing import NamedTuple

PRIOR = "https://huggingface.co/warp-ai/wuerstchen-prior/resolve/main"
DECODER = "https://huggingface.co/warp-ai/wuerstchen/resolve/main"


class Published(NamedTuple):
    url: str
    size: str  # about: parameters times the bytes of one


PUBLISHED = {
    "wuerstchen_v2_stage_c.safetensors": Published(f"{PRIOR}/prior/diffusion_pytorch_model.safetensors", "4.0 GB"),
    "clip_g.safetensors": Published(
        "https://huggingface.co/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/text_encoders/clip_g.safetensors",
        "1.4 GB",
    ),
    "wuerstchen_v2_stage_b.safetensors": Published(f"{DECODER}/decoder/diffusion_pytorch_model.safetensors", "4.2 GB"),
    "wuerstchen_clip_h.safetensors": Published(f"{DECODER}/text_encoder/model.safetensors", "1.4 GB"),
    "wuerstchen_stage_a.safetensors": Published(f"{DECODER}/vqgan/diffusion_pytorch_model.safetensors", "74 MB"),
    "model_v2_stage_b.pt": Published(
        "https://huggingface.co/dome272/wuerstchen/resolve/main/model_v2_stage_b.pt", "4.3 GB"
    ),
}
