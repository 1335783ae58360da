"""The nodes' schemas as they were last recorded: users' graphs keep ids, and widgets and links by their places.

`python -m tests.nodes.record` records them as they are now, unless graphs that users have saved would break.
"""

import asyncio
import json
import sys

from tests.nodes.inputs import ROOT

RECORD = ROOT / "wuerstchen_core" / "workflow" / "nodes.json"
FROM_FOLDERS = ("file", "model", "previewer")  # combos that list the user's files
LIMITS = ("default", "min", "max", "multiline", "control_after_generate")


def described(nodes: dict) -> dict:
    """Node id -> title, inputs and outputs."""
    return {node_id: _described(node.define_schema()) for node_id, node in sorted(nodes.items())}


def _described(schema) -> dict:
    inputs = []
    for given in schema.inputs:
        known = {"id": given.id, "type": given.get_io_type(), "optional": bool(given.optional)}
        known |= {name: value for name in LIMITS if (value := getattr(given, name, None)) is not None}
        if known["type"] == "COMBO" and given.id not in FROM_FOLDERS:
            known["options"] = list(given.options)
        inputs.append(known)
    outputs = [[output.display_name or output.get_io_type(), output.get_io_type()] for output in schema.outputs]
    return {"title": schema.display_name, "inputs": inputs, "outputs": outputs}


def breaks(before: dict, now: dict) -> list[str]:
    """What keeps graphs saved with the schemas `before` from working with those of `now`."""
    found = []
    for node_id, node in before.items():
        if node_id not in now:
            found.append(f"{node_id} is gone: node ids never change")
            continue
        inputs = now[node_id]["inputs"]
        for place, old in enumerate(node["inputs"]):
            new = inputs[place] if place < len(inputs) else {"id": "nothing", "type": "", "optional": True}
            if (new["id"], new["type"]) != (old["id"], old["type"]):
                found.append(f"{node_id}: {new['id']} is where {old['id']} was: inputs keep their places and types")
            elif old["optional"] and not new["optional"]:
                found.append(f"{node_id}: {old['id']} was optional")
            elif not set(old.get("options", ())) <= set(new.get("options", ())):
                found.append(f"{node_id}: {old['id']} has lost an option")
            elif new.get("min", 0) > old.get("min", 0) or new.get("max", 0) < old.get("max", 0):
                found.append(f"{node_id}: {old['id']} takes fewer values")
        found += [
            f"{node_id}: {new['id']} is new and must be optional"
            for new in inputs[len(node["inputs"]) :]
            if not new["optional"]
        ]
        types = [[output[1] for output in each["outputs"]] for each in (node, now[node_id])]
        if types[1][: len(types[0])] != types[0]:
            found.append(f"{node_id}: outputs keep their places and types")
    return found


def main() -> None:
    from tests.conftest import load_pack

    async def listed():
        return await (await load_pack("recorded").comfy_entrypoint()).get_node_list()

    now = described({node.define_schema().node_id: node for node in asyncio.run(listed())})
    if RECORD.exists() and (broken := breaks(json.loads(RECORD.read_text(encoding="utf-8")), now)):
        sys.exit("\n".join(broken))
    lines = (f"{json.dumps(node_id)}: {json.dumps(node, ensure_ascii=False)}" for node_id, node in now.items())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
