from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Reads the tensor once and copies nothing, as `isfinite` would."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # 8 bits have no comparisons of their own
        tensor = tensor.float()
    return all(extreme.isfinite() for extreme in tensor.aminmax())
