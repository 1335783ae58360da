"""What ComfyUI's server gives its page of this pack: texts in Chinese, and the folder of the help pages."""

import asyncio
import importlib
import json
from pathlib import Path

import folder_paths

from tests.nodes.inputs import ROOT


def test_the_server_finds_the_translations_and_the_help_pages(nodes, tmp_path, monkeypatch):
    (tmp_path / "wuerstchen").symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    manager = importlib.import_module("app.custom_node_manager").CustomNodeManager()
    zh = manager.build_translations()["zh"]
    assert zh["nodeDefs"] == json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(zh["nodeCategories"]) == {"Würstchen"}

    host = importlib.import_module("nodes")
    monkeypatch.setattr(host, "EXTENSION_WEB_DIRS", {})
    monkeypatch.setattr(host, "NODE_CLASS_MAPPINGS", {})
    monkeypatch.setattr(host, "NODE_DISPLAY_NAME_MAPPINGS", {})
    assert asyncio.run(host.load_custom_node(str(tmp_path / "wuerstchen")))
    assert set(host.NODE_CLASS_MAPPINGS) == set(nodes)
    (web,) = host.EXTENSION_WEB_DIRS.values()
    assert all((Path(web) / "docs" / node_id / "zh.md").is_file() for node_id in nodes)
