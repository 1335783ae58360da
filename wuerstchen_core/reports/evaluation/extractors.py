"""Features of pictures: those of Inception, which papers use, or of the semantic compressor, which is at hand."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ...checkpoints.archive import open_archive
from ...checkpoints.load import load_semantic_compressor
from ...checkpoints.sets import MINI, SET
from ...models.semantic_compressor import IMAGENET_MEAN, IMAGENET_STD, SemanticCompressor
from ...util.errors import WuerstchenError, readable
from .kept import hash_of


def resized(image: Tensor, side: int) -> Tensor:
    """image (3, H, W) in [0, 1] -> (3, side, side): antialiased bicubic, not rounded (clean-fid, arXiv 2104.11222)."""
    return functional.resize(image, [side, side], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


class Extractor(nn.Module):
    """Pictures -> features.

    `side` is the side in pixels that pictures are resized to, `num_features` the number of features, `about` one line
    on where they come from, `comparable` whether figures of these features may be compared with those of papers, and
    `classifies` whether there are logits.
    """

    side: int
    num_features: int
    about: str
    comparable = False
    classifies = False

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, side, side) in [0, 1] -> (B, num_features)"""
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor | None:
        """features (B, num_features) -> the classifier's logits (B, classes), or None if there is no classifier."""
        return None

    @torch.inference_mode()
    def score(self, images: list[Tensor], captions: list[str]) -> Tensor:
        """images of any size (3, H, W) in [0, 1] -> (B, num_features) float32 on the CPU"""
        batch = torch.stack([resized(image, self.side) for image in images])
        return self(batch.to(next(self.parameters()).device)).float().cpu()


class CompressorFeatures(Extractor):
    """The compressor's backbone, averaged over positions, as Inception's features are."""

    side = 256

    def __init__(self, compressor: SemanticCompressor, name: str):
        super().__init__()
        self.compressor, self.num_features = compressor, compressor.config.features
        self.about = f"features of {name}: not comparable with papers, which use Inception's"

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self.compressor.backbone((images - mean) / std).mean(dim=(2, 3))


class InceptionFeatures(Extractor):
    """Inception V3 as FID has it: TensorFlow's of 2015, 2048 features before the last layer, 1008 classes.

    The blocks are torch-fidelity's, which compute what TensorFlow does; torchvision's differ.
    """

    side = 299
    num_features = 2048
    comparable = True
    classifies = True

    def __init__(self, about: str = ""):
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as blocks
        except ImportError as error:
            raise WuerstchenError(
                f"Inception needs torch-fidelity, which can't be imported ({readable(error)}): "
                "pip install -e '.[measure]'"
            ) from error
        self.about = about
        self.layers = nn.Sequential(
            OrderedDict(
                Conv2d_1a_3x3=blocks.BasicConv2d(3, 32, kernel_size=3, stride=2),
                Conv2d_2a_3x3=blocks.BasicConv2d(32, 32, kernel_size=3),
                Conv2d_2b_3x3=blocks.BasicConv2d(32, 64, kernel_size=3, padding=1),
                MaxPool_1=nn.MaxPool2d(3, stride=2),
                Conv2d_3b_1x1=blocks.BasicConv2d(64, 80, kernel_size=1),
                Conv2d_4a_3x3=blocks.BasicConv2d(80, 192, kernel_size=3),
                MaxPool_2=nn.MaxPool2d(3, stride=2),
                Mixed_5b=blocks.InceptionA(192, pool_features=32),
                Mixed_5c=blocks.InceptionA(256, pool_features=64),
                Mixed_5d=blocks.InceptionA(288, pool_features=64),
                Mixed_6a=blocks.InceptionB(288),
                Mixed_6b=blocks.InceptionC(768, channels_7x7=128),
                Mixed_6c=blocks.InceptionC(768, channels_7x7=160),
                Mixed_6d=blocks.InceptionC(768, channels_7x7=160),
                Mixed_6e=blocks.InceptionC(768, channels_7x7=192),
                Mixed_7a=blocks.InceptionD(768),
                Mixed_7b=blocks.InceptionE_1(1280),
                Mixed_7c=blocks.InceptionE_2(2048),
            )
        )
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images * 255 - 128) / 128).mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Without the bias, as the Inception Score has them."""
        return features.to(self.fc.weight) @ self.fc.weight.T


def load_inception(path: str | Path, device: str = "cpu") -> InceptionFeatures:
    """Inception V3 with the weights of `weights-inception-2015-12-05-6726825d.pth`, a file of torch-fidelity.

    Only tensors are read from the file. Raises WuerstchenError if it is missing, damaged or holds something else.
    """
    archive = open_archive(path)
    with torch.device("meta"):
        network = InceptionFeatures(f"Inception V3, {Path(path).name}, SHA-256 {hash_of(path)}")
    state = {}
    for name, value in network.state_dict().items():
        theirs = name.removeprefix("layers.")
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.long)
        elif theirs not in archive.tensors or archive.tensors[theirs].shape != value.shape:
            raise WuerstchenError(
                f"{path}: not the weights of FID's Inception ({theirs} is missing or of another shape): "
                "--inception takes weights-inception-2015-12-05-6726825d.pth of torch-fidelity"
            )
        else:
            state[name] = archive.read(theirs).float()
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False).to(device)


def load_compressor_features(path: str | Path | None = None, device: str = "cpu") -> CompressorFeatures:
    """The features of a semantic compressor from a file, by default the mini's."""
    name = "the mini's semantic compressor" if path is None else Path(path).name
    compressor = load_semantic_compressor(MINI / SET["semantic_compressor"] if path is None else path, device)
    return CompressorFeatures(compressor, name).eval().requires_grad_(False)
