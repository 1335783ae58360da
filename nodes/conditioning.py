"""ComfyUI's CONDITIONING to the text that the core takes. What is not supported is refused, never ignored."""

from torch import Tensor

from ..wuerstchen_core import WuerstchenError

CHUNK = 77

# What an entry may say beside its text: these values change nothing.
NEUTRAL = {
    "strength": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "clip_start_percent": 0.0,
    "clip_end_percent": 1.0,
}
UNREAD = ("pooled_output", "set_area_to_bounds", "mask_strength", "control_apply_to_uncond")  # nothing by themselves
NAMES = {
    "strength": "strength",
    "area": "area",
    "mask": "mask",
    "start_percent": "timestep range",
    "end_percent": "timestep range",
    "control": "ControlNet",
    "gligen": "GLIGEN",
    "hooks": "hooks",
}


def text_of(conditioning: list | None, socket: str, stage: str, width: int, batch: int) -> Tensor | None:
    """The text of a CONDITIONING (1 or batch, L, width); None for None.

    Args:
        socket, stage: what messages call them, "positive" and "Stage C".
        width: that of the stage's text encoder.
        batch: how many pictures are drawn.

    Raises:
        WuerstchenError: it is no CONDITIONING of one entry, its entry says more than its text (an area, a mask, a
            strength, a timestep range, hooks, a ControlNet, …), or its text has another width or number of rows.
    """
    if conditioning is None:
        return None
    where = f"{socket} of Würstchen {stage} Sampler"
    if not isinstance(conditioning, list | tuple) or not all(map(_is_entry, conditioning)):
        raise WuerstchenError(
            f"{where}: expected a CONDITIONING, got {type(conditioning).__name__}: take it from Würstchen Text Encode"
        )
    if not conditioning:
        raise WuerstchenError(f"{where}: this CONDITIONING is empty: take it from Würstchen Text Encode")
    if len(conditioning) > 1:
        raise WuerstchenError(
            f"{where}: {len(conditioning)} entries (Conditioning Combine) are not supported: join the texts with "
            "Conditioning Concat"
        )
    [(text, extra)] = conditioning
    unsupported = dict.fromkeys(NAMES.get(name, str(name)) for name, value in extra.items() if _says(name, value))
    if unsupported:
        named = ", ".join(unsupported)
        raise WuerstchenError(f"{where}: not supported: {named[:200]}; take out the nodes that set it")
    if text.shape[-1] != width:
        raise WuerstchenError(
            f"{where}: {stage} was trained with a text encoder of width {width}, but this text comes from one of width "
            f"{text.shape[-1]}: encode it with the text encoder that belongs to {stage}"
        )
    if not text.shape[1]:
        raise WuerstchenError(f"{where}: this text has no tokens: take it from Würstchen Text Encode")
    if text.shape[0] not in (1, batch):
        raise WuerstchenError(
            f"{where}: its text has {text.shape[0]} rows, but {batch} picture{'s are' if batch > 1 else ' is'} drawn: "
            f"give one row for all{f' or {batch}' if batch > 1 else ''}"
        )
    return text


def token_count(*texts: Tensor | None) -> int:
    """The length of the longest text, one chunk of CLIP's at least."""
    return max([CHUNK, *(text.shape[1] for text in texts if text is not None)])


def _is_entry(entry) -> bool:
    return (
        isinstance(entry, list | tuple)
        and len(entry) == 2
        and isinstance(entry[0], Tensor)
        and entry[0].dim() == 3
        and isinstance(entry[1], dict)
    )


def _says(name: str, value) -> bool:
    """Whether this would change the picture."""
    if value is None or name in UNREAD:
        return False
    return name not in NEUTRAL or isinstance(value, Tensor) or value != NEUTRAL[name]
