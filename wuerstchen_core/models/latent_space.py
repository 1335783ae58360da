from dataclasses import dataclass

from torch import Tensor

from .config import require


@dataclass(frozen=True)
class LatentSpace:
    """How Stage C's space is got from the compressor's raw features: (features + shift) / scale. Default: v2's."""

    shift: float = 1.0
    scale: float = 42.0

    def check(self) -> None:
        """Raises WuerstchenError unless there is a way back from this space."""
        require(self.scale > 0, f"latent_space has scale {self.scale}: it must be above 0")

    def from_features(self, features: Tensor) -> Tensor:
        return (features + self.shift) / self.scale

    def to_features(self, latent: Tensor) -> Tensor:
        return latent * self.scale - self.shift
