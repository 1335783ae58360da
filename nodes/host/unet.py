"""What nodes look for that are made for Stable Diffusion's U-Net: they are told that Würstchen has none."""

import re

from ...wuerstchen_core import WuerstchenError

ATTENTION = re.compile(r"attn[12]\.to_")


UNREAD = {  # in a conditioning -> the node that puts it there, and what to do instead
    "unclip_conditioning": ("unCLIPConditioning", "Würstchen Semantic Compress makes a latent of a picture"),
    "stable_cascade_prior": ("StableCascade_StageB_Conditioning", "use Würstchen Stage B Conditioning"),
    "reference_latents": ("ReferenceLatent", "start the sampler from that latent, with denoise below 1"),
    "guidance": ("FluxGuidance", "guidance is the sampler's cfg"),
}


def refuse_unread(conditioning: dict) -> None:
    """Raises WuerstchenError for what a node has put into a conditioning for another model, and nothing reads here."""
    for name, (node, remedy) in UNREAD.items():
        if conditioning.get(name) is not None:
            raise WuerstchenError(
                f"{node} is for another model, and Würstchen's networks read nothing of it: take it out; {remedy}"
            )
    if conditioning.get("concat_mask") is not None and conditioning.get("denoise_mask") is None:
        raise WuerstchenError(
            "InpaintModelConditioning without noise_mask is for models trained to inpaint: switch its noise_mask on, "
            "or use SetLatentNoiseMask"
        )


class UNetConfig(dict):
    """What nodes read of the U-Net's shape."""

    def __missing__(self, key):
        raise WuerstchenError(
            f"this node is for Stable Diffusion's U-Net (it looks for {key}), and Würstchen's networks are others: "
            "take it out"
        )

    def copy(self):
        return UNetConfig(self)


class WeightName(str):
    """A weight's name, in whose end nodes look for a U-Net's attention to multiply it."""

    def endswith(self, suffix, *place):
        if isinstance(suffix, str) and ATTENTION.match(suffix):
            raise WuerstchenError(
                f"this node is for Stable Diffusion's U-Net (it looks for {suffix}), and Würstchen's attention is "
                "another: take it out"
            )
        return super().endswith(suffix, *place)


def replacements(transformer_options: dict, known: tuple | None = None):
    """The replacement for the block that is known, or None. Raises WuerstchenError for patches that nothing reads."""
    found = None
    unread = [name for name, patches in transformer_options.get("patches", {}).items() if patches]
    for kind, blocks in transformer_options.get("patches_replace", {}).items():
        for block, replacement in blocks.items():
            if (kind, block) == known:
                found = replacement
            else:
                unread.append(f"{kind} of block {' '.join(map(str, block))}")
    if unread:
        raise WuerstchenError(
            f"a node before the sampler changes a part that Würstchen's networks do not have ({unread[0]}): it is made "
            "for another model, take it out"
        )
    return found
