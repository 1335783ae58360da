"""The loaders: whole sets and single files."""

import os
import shutil
from pathlib import Path

import pytest

import wuerstchen_core as w
from tests.nodes.inputs import ROOT, noise, same
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig
from wuerstchen_core.pipeline import decode

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
        assert module("nodes.host").model_sets()["mini"] == ROOT / "wuerstchen_core" / "mini" / "weights"
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


def test_a_set_that_lacks_files_is_refused_with_their_names(run, nodes, models, tiny_folder, caplog):
    shutil.copytree(tiny_folder, models / "wuerstchen" / "torn")
    for name in ("stage_b", "text_encoder"):
        (models / "wuerstchen" / "torn" / f"{name}.safetensors").unlink()
    (models / "wuerstchen" / "of other files").mkdir()
    for _ in range(2):
        assert options(nodes) == ["mini"]
    missing = "not a whole set of weights, stage_b.safetensors, text_encoder.safetensors missing"
    assert caplog.text.count(missing) == 1 and "of other files" not in caplog.text
    with pytest.raises(ValueError, match=f"torn: {missing}"):
        run("WuerstchenLoadModel", model="torn")


def test_a_folder_that_cannot_be_searched_keeps_nothing_from_loading(
    nodes, run, listed, models, tiny_folder, monkeypatch
):
    shutil.copytree(tiny_folder, models / "wuerstchen" / "open")
    shutil.copytree(tiny_folder, models / "wuerstchen" / "closed")
    shutil.copytree(tiny_folder, models / "checkpoints" / "closed")
    stat, iterdir = Path.stat, Path.iterdir

    def closed(path, *args, **kwargs):
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    def is_there(path):
        try:
            return bool(path.stat())
        except FileNotFoundError:
            return False

    monkeypatch.setattr(Path, "stat", closed)
    monkeypatch.setattr(Path, "is_file", is_there)
    monkeypatch.setattr(Path, "exists", is_there)
    assert options(nodes) == ["mini", "open"]
    for node_id in SINGLE:
        assert not any("closed" in name for name in listed(node_id))
    with pytest.raises(ValueError, match="closed: can't be read .Permission denied."):
        run("WuerstchenLoadModel", model="closed")
    monkeypatch.setattr(Path, "iterdir", lambda path: closed(path / "closed" / "x") and iterdir(path))
    assert options(nodes) == ["mini"]


def test_a_name_with_the_other_systems_separators_is_the_same_file(run, models, tiny_folder):
    (models / "vae" / "deep" / "er").mkdir(parents=True)
    shutil.copy(tiny_folder / SET["stage_a"], models / "vae" / "deep" / "er" / "a.safetensors")
    for name in ("deep/er/a.safetensors", "deep\\er\\a.safetensors"):
        assert type(run("WuerstchenLoadStageA", file=name).network).__name__ == "VQGAN"
    for name in ("..\\vae\\deep\\er\\a.safetensors", "deep\\er\\..\\er\\a.safetensors"):
        with pytest.raises(ValueError, match="no such file in models/vae"):
            run("WuerstchenLoadStageA", file=name)


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
