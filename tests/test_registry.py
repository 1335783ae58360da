"""What ComfyUI's registry asks of a pack, and that a published archive has all that the pack needs."""

import fnmatch
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import resvg_py
from PIL import Image

from wuerstchen_core.workflow.graph import PACK

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets"


@pytest.fixture(scope="module")
def metadata():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_name_is_one_that_the_registry_takes(metadata):
    """docs.comfy.org/registry/specifications; it cannot be changed once it is published."""
    name = metadata["project"]["name"]
    assert re.fullmatch(r"[a-z]+([-_.]?[a-z0-9]+)*", name) and len(name) < 100 and "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["project"]["version"])


def test_the_version_is_the_same_everywhere(metadata):
    project = metadata["project"]
    assert PACK == (project["name"], project["version"])
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (.*)$", changes, re.MULTILINE)[1] == project["version"]
    for path in (ROOT / "workflows").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if node["type"].startswith("Wuerstchen"):
                assert (node["properties"]["cnr_id"], node["properties"]["ver"]) == PACK, path


def test_the_page_of_the_pack_has_what_it_shows(metadata):
    comfy, urls = metadata["tool"]["comfy"], metadata["project"]["urls"]
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"] == ">=0.3.64"
    address = urls["Repository"].removeprefix("https://github.com/")
    for key, name in (("Icon", "icon.png"), ("Banner", "banner.png")):
        assert comfy[key] == f"https://raw.githubusercontent.com/{address}/main/assets/{name}"
    publish = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert f"s|{address}|$REPOSITORY|g" in publish
    with Image.open(ASSETS / "icon.png") as icon, Image.open(ASSETS / "banner.png") as banner:
        assert icon.width == icon.height <= 400
        assert banner.width * 9 == banner.height * 21


@pytest.mark.parametrize("name", ["icon", "banner"])
def test_the_pictures_are_those_of_their_vectors(name):
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(ASSETS / f"{name}.svg")))))
    kept = Image.open(ASSETS / f"{name}.png")
    assert drawn.size == kept.size
    assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(kept, dtype=int)).mean() < 0.5


def test_an_archive_has_the_pack_and_the_mini_without_the_tests():
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    left = [
        path
        for path in listed.stdout.splitlines()
        if not any(path.startswith(each) if each.endswith("/") else fnmatch.fnmatch(path, each) for each in ignored)
    ]
    folders = {path.split("/")[0] for path in left}
    assert not folders & {"tests", ".ci", ".github", "assets"}
    needed = ["__init__.py", "requirements.txt", "pyproject.toml", "wuerstchen_core/workflow/nodes.json"]
    weights = [path for path in left if path.startswith("wuerstchen_core/mini/weights/")]
    assert set(needed) <= set(left) and len(weights) == 8 and {"nodes", "workflows"} <= folders
