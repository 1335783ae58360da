"""The discriminator of Stage A, which tells decoded patches from real ones (VQGAN, arXiv 2012.09841)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST = 1e4  # largest ratio of the gradient norms


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): one logit per patch, high for patches of real pictures.

    Its normalisation is GroupNorm, which does not depend on the rest of the batch.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        net: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        narrow = width
        for i in range(1, layers + 1):
            wide = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            net += [nn.Conv2d(narrow, wide, 4, stride, padding=1, bias=False), nn.GroupNorm(8, wide), nn.LeakyReLU(0.2)]
            narrow = wide
        self.net = nn.Sequential(*net, nn.Conv2d(narrow, 1, 4, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures (B, 3, H, W) in [0, 1] -> logits (B, 1, h, w)"""
        return self.net(pictures * 2 - 1)


def discriminator_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """The hinge loss of the discriminator's logits for real and for drawn patches (arXiv 1705.02894)."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + drawn.float()).mean()) / 2


def adversarial_loss(drawn: Tensor) -> Tensor:
    """The loss of the network that has drawn the patches, from their logits."""
    return -drawn.float().mean()


class Balance(torch.autograd.Function):
    """A drawn picture twice: for the reconstruction losses, and for the discriminator, whose gradient is rescaled.

    The second gradient is multiplied by `weight` and by the ratio of the two gradients' norms at the last layer's
    weights. This is VQGAN's adaptive weight (arXiv 2012.09841, equation 7) without an extra backward pass, since both
    gradients are known where they meet. Each process uses the ratio of its own micro-batch.
    """

    @staticmethod
    def forward(ctx, drawn: Tensor, hidden: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """drawn (B, 3, H, W), which is PixelShuffle of a 1x1 convolution of `hidden` (B, C, H / p, W / p)"""
        ctx.save_for_backward(hidden)
        ctx.weight = weight
        return drawn.clone(), drawn.clone()

    @staticmethod
    def backward(ctx, reconstruction: Tensor, adversarial: Tensor) -> tuple[Tensor, None, None]:
        (hidden,) = ctx.saved_tensors
        ratio = _last_layer_norm(reconstruction, hidden) / (_last_layer_norm(adversarial, hidden) + 1e-6)
        return reconstruction + ctx.weight * ratio.clamp(max=MOST) * adversarial, None, None


def _last_layer_norm(gradient: Tensor, hidden: Tensor) -> Tensor:
    """The norm of the gradient of a 1x1 convolution's weights, from the gradient of the picture that it drew."""
    planes = F.pixel_unshuffle(gradient.float(), gradient.shape[-1] // hidden.shape[-1])
    return torch.einsum("b o h w, b i h w -> o i", planes, hidden.float()).norm()
