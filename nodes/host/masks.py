"""Which noise masks Stage C has followed.

They stay on its LATENT. Stage B draws the whole picture, and shall not pass over one that was set after Stage C."""

import hashlib
import threading
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor

MOST_PICTURES = 4096

_masks: OrderedDict[bytes, tuple[bytes, tuple[int, int]] | None] = OrderedDict()  # of what Stage C has drawn, by digest
_lock = threading.Lock()


def note(sampled: Tensor, mask: Tensor | None) -> None:
    """sampled (B, C, p, q) was drawn by Stage C under mask (1 or B, any channels, p, q), or under none."""
    with _lock:
        for index, picture in enumerate(sampled):
            followed = None if mask is None else (_digest(mask[index % len(mask), 0]), (mask.shape[-2], mask.shape[-1]))
            _masks[_digest(picture)] = followed
        while len(_masks) > MOST_PICTURES:
            _masks.popitem(last=False)


def is_followed(samples: Tensor, mask: Tensor) -> bool:
    """Whether Stage C, in this process, has drawn all of samples (B, C, p, q) under mask (1 or B, 1, rows, columns).

    Samples that it has not drawn may be made of some that it has: it must have followed the mask for any. A mask that
    covers everything needs no following.
    """
    if mask.min() >= 1:
        return True
    with _lock:
        known, followed = dict(_masks), {each for each in _masks.values() if each is not None}
    fitted = {size: F.interpolate(mask.float(), size=size, mode="bilinear") for size in {size for _, size in followed}}
    for index, picture in enumerate(samples):
        masks = {(_digest(each[index % len(each), 0]), size) for size, each in fitted.items()}
        drawn = _digest(picture)
        if masks.isdisjoint({known[drawn]} if drawn in known else followed):
            return False
    return True


def _digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(tensor.detach().float().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
