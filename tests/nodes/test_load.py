"""Where the loaders find their files, and when they read them again."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.nodes.inputs import ROOT
from wuerstchen_core.checkpoints.published import PUBLISHED
from wuerstchen_core.checkpoints.sets import SET

KINDS = {  # loader -> its kind, where its files lie, a file of that kind
    "WuerstchenLoadStageA": ("stage_a", ("vae", "checkpoints"), SET["stage_a"]),
    "WuerstchenLoadStageB": ("stage_b", ("diffusion_models", "checkpoints"), SET["stage_b"]),
    "WuerstchenLoadStageC": ("stage_c", ("diffusion_models", "checkpoints"), SET["stage_c"]),
    "WuerstchenLoadTextEncoder": ("text_encoder", ("text_encoders", "checkpoints"), SET["text_encoder_c"]),
    "WuerstchenLoadSemanticCompressor": (
        "semantic_compressor",
        ("clip_vision", "diffusion_models", "checkpoints"),
        SET["semantic_compressor"],
    ),
}


@pytest.fixture
def folders(nodes, module):
    """The module that knows ComfyUI's folders."""
    nodes["WuerstchenLoadModel"].define_schema()
    return module("nodes.host.folders")


def options(nodes):
    return nodes["WuerstchenLoadModel"].define_schema().inputs[0].options


@pytest.fixture
def listed(nodes):
    return lambda node_id: nodes[node_id].define_schema().inputs[0].options


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
        assert module("nodes.host.folders").model_sets()["mini"] == ROOT / "wuerstchen_core" / "mini" / "weights"
    finally:
        shutil.rmtree(models / "mini")
        shutil.rmtree(elsewhere)
        shutil.rmtree(models / "torn")
        (models / "a file").unlink()


def test_an_unknown_set_is_refused_with_those_there_are(folders, models, tiny_folder, monkeypatch):
    """ComfyUI's list of choices does not hold a workflow to them."""
    monkeypatch.chdir(tiny_folder.parent)
    for name in (tiny_folder.name, str(tiny_folder), "../wuerstchen", ""):
        with pytest.raises(ValueError, match="no whole set of that name in models/wuerstchen; take mini$"):
            folders.model_set(name)


def test_a_set_that_lacks_files_is_refused_with_their_names(folders, nodes, models, tiny_folder, caplog):
    shutil.copytree(tiny_folder, models / "wuerstchen" / "torn")
    for name in ("stage_b", "text_encoder"):
        (models / "wuerstchen" / "torn" / f"{name}.safetensors").unlink()
    (models / "wuerstchen" / "of other files").mkdir()
    for _ in range(2):
        assert options(nodes) == ["mini"]
    missing = "not a whole set of weights, stage_b.safetensors, text_encoder.safetensors missing"
    assert caplog.text.count(missing) == 1 and "of other files" not in caplog.text
    with pytest.raises(ValueError, match=f"torn: {missing}"):
        folders.model_set("torn")


def test_a_folder_that_cannot_be_searched_keeps_nothing_from_loading(
    nodes, folders, listed, models, tiny_folder, monkeypatch
):
    shutil.copytree(tiny_folder, models / "wuerstchen" / "open")
    shutil.copytree(tiny_folder, models / "wuerstchen" / "closed")
    shutil.copytree(tiny_folder, models / "checkpoints" / "closed")
    stat, iterdir = os.stat, Path.iterdir

    def closed(path, *args, **kwargs):
        if not isinstance(path, int) and Path(path).parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", closed)
    assert options(nodes) == ["mini", "open"]
    for node_id in KINDS:
        assert not any("closed" in name for name in listed(node_id))
    with pytest.raises(ValueError, match="closed.*: cannot be read .Permission denied."):
        folders.model_set("closed")
    monkeypatch.setattr(Path, "iterdir", lambda path: closed(path / "closed" / "x") and iterdir(path))
    assert options(nodes) == ["mini"]


def test_a_name_with_the_other_systems_separators_is_the_same_file(folders, models, tiny_folder):
    (models / "vae" / "deep" / "er").mkdir(parents=True)
    file = models / "vae" / "deep" / "er" / "a.safetensors"
    shutil.copy(tiny_folder / SET["stage_a"], file)
    for name in ("deep/er/a.safetensors", "deep\\er\\a.safetensors"):
        assert folders.listed_file("stage_a", name) == file
    for name in ("..\\vae\\deep\\er\\a.safetensors", "deep\\er\\..\\er\\a.safetensors"):
        with pytest.raises(ValueError, match="no such file in models/vae"):
            folders.listed_file("stage_a", name)


@pytest.mark.parametrize("node_id", KINDS)
def test_a_loader_lists_the_weight_files_of_its_folders(listed, models, node_id):
    folders = (*KINDS[node_id][1], "wuerstchen")
    assert listed(node_id) == []
    for folder in models.iterdir():
        for name in (f"{folder.name}.safetensors", f"{folder.name}.pt", f"deep/{folder.name}.ckpt", "notes.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
    (models / folders[0] / "gone.pth").symlink_to(models / "nowhere")
    expected = [os.path.join(*name.split("/")) for folder in folders
                for name in sorted((f"{folder}.pt", f"{folder}.safetensors", f"deep/{folder}.ckpt"))]  # fmt: skip
    assert listed(node_id) == expected


def test_one_folder_under_two_names_is_listed_once(listed, models):
    (models / "diffusion_models" / "one.pt").touch()
    (models / "checkpoints").rmdir()
    (models / "checkpoints").symlink_to(models / "diffusion_models")
    assert listed("WuerstchenLoadStageB") == ["one.pt"]


@pytest.mark.parametrize("node_id", KINDS)
def test_only_listed_names_are_a_way_to_a_file(folders, models, tiny_folder, node_id, monkeypatch):
    kind, places, name = KINDS[node_id]
    for place in (models / places[0] / "a.safetensors", models / "a.safetensors", models / places[0] / "a.txt"):
        shutil.copy(tiny_folder / name, place)
    monkeypatch.chdir(models)
    assert folders.listed_file(kind, "a.safetensors") == models / places[0] / "a.safetensors"
    for path in (f"../{places[0]}/a.safetensors", "../a.safetensors", str(models / "a.safetensors"), "./a.safetensors",
                 "a.txt", "", "a.safetensors [checkpoints]"):  # fmt: skip
        with pytest.raises(ValueError, match=f"no such file in models/{places[0]}, ") as caught:
            folders.listed_file(kind, path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_released_file_that_is_missing_is_named_with_its_size_and_address(nodes, folders, models, name):
    kinds = {"clip": "TextEncoder", "stage_c": "StageC", "stage_a": "StageA", "stage_b": "StageB"}
    loader = nodes["WuerstchenLoad" + next(kinds[part] for part in kinds if part in name)]
    said = loader.validate_inputs(file=name)
    for part in (f"{name}: there is no such file in models/", PUBLISHED[name].url, PUBLISHED[name].size):
        assert part in said
    assert len(said) < 500 and "\n" not in said
    with pytest.raises(ValueError, match=re.escape(said)):
        folders.listed_file(loader.KIND, name)
    (models / folders.FOLDERS[loader.KIND][0] / name).touch()
    assert loader.validate_inputs(file=name) is True


def test_what_is_missing_is_said_before_a_run(nodes, models):
    """ComfyUI itself would say that a value is not in a list."""
    for node_id in KINDS:
        assert "own.safetensors: there is no such file in models/" in nodes[node_id].validate_inputs("own.safetensors")
        assert nodes[node_id].validate_inputs() is True  # it comes from another node
    assert "no such file in models/loras" in nodes["WuerstchenLoadLoRA"].validate_inputs("style.safetensors")
    assert "take mini" in nodes["WuerstchenLoadModel"].validate_inputs("another")
    assert nodes["WuerstchenLoadModel"].validate_inputs("mini") is True
    (models / "clip_vision" / "c.pt").touch()
    compressor = nodes["WuerstchenLoadSemanticCompressor"]
    assert "none.pt: there is no such file in models/vae_approx" in compressor.validate_inputs("c.pt", "none.pt")
    assert compressor.validate_inputs("c.pt", compressor.LINEAR) is True


def test_the_released_files_are_those_that_the_templates_offer():
    graph = json.loads((ROOT / "workflows" / "text_to_image_v2.json").read_text(encoding="utf-8"))
    offered = [model for node in graph["nodes"] for model in node["properties"].get("models", ())]
    assert len(offered) >= 4
    for model in offered:
        assert PUBLISHED[model["name"]].url == model["url"]


def test_files_of_one_name_can_all_be_reached(folders, listed, models):
    import folder_paths

    second = models.parent / "second"
    second.mkdir()
    folder_paths.add_model_folder_path("text_encoders", str(second))
    places = {
        "model.safetensors": models / "text_encoders",
        "model.safetensors [text_encoders 2]": second,
        "model.safetensors [checkpoints]": models / "checkpoints",
        "model.safetensors [wuerstchen]": models / "wuerstchen",
    }
    for folder in places.values():
        (folder / "model.safetensors").touch()
    assert listed("WuerstchenLoadTextEncoder") == list(places)
    for name, folder in places.items():
        assert folders.listed_file("text_encoder", name) == folder / "model.safetensors"


def test_a_changed_file_changes_the_fingerprint(nodes, models, tiny_folder):
    """ComfyUI keeps a loader's networks for as long as its fingerprint stays the same."""
    loader, file = nodes["WuerstchenLoadStageC"], models / "diffusion_models" / "c.safetensors"
    missing = loader.fingerprint_inputs(file="c.safetensors", weight_dtype="default")
    shutil.copy(tiny_folder / SET["stage_c"], file)
    first = loader.fingerprint_inputs(file="c.safetensors", weight_dtype="default")
    assert first == loader.fingerprint_inputs(file="c.safetensors", weight_dtype="default") != missing
    os.utime(file, ns=(1, 1))
    touched = loader.fingerprint_inputs(file="c.safetensors", weight_dtype="default")
    with open(file, "ab") as stream:
        stream.write(b"0")
    os.utime(file, ns=(1, 1))
    assert len({first, touched, loader.fingerprint_inputs(file="c.safetensors", weight_dtype="default")}) == 3


@pytest.mark.parametrize("role", SET)
def test_every_file_of_a_set_counts_in_its_fingerprint(nodes, models, tiny_folder, role):
    folder, loader = models / "wuerstchen" / "own", nodes["WuerstchenLoadModel"]
    shutil.copytree(tiny_folder, folder)
    for optional in ("text_encoder_b", "previewer"):
        (folder / SET[optional]).touch()
    first = loader.fingerprint_inputs(model="own", weight_dtype="default")
    os.utime(folder / SET[role], ns=(1, 1))
    assert first != loader.fingerprint_inputs(model="own", weight_dtype="default")


def test_a_fingerprint_never_raises(nodes, models):
    for wrong in ("none.safetensors", "", None, 3, ["a"], "../a"):
        for node_id in KINDS:
            assert nodes[node_id].fingerprint_inputs(file=wrong)
        assert nodes["WuerstchenLoadModel"].fingerprint_inputs(model=wrong)
        assert nodes["WuerstchenLoadLoRA"].fingerprint_inputs(model=None, file=wrong, strength=1.0)
        compressor = nodes["WuerstchenLoadSemanticCompressor"]
        assert compressor.fingerprint_inputs(file=wrong, previewer=wrong)
