"""The house's order: a room imports only from floors below it and is loaded when touched; none imports experiments."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compo_jax

ROOT = Path(__file__).parents[1]
FLOORS = {
    "tree": 0, "files": 0, "mesh": 0, "lapack": 0, "memory": 0, "data": 1, "models": 1, "adapters": 1, "curvature": 1,
    "compose": 2, "train": 2, "pool": 2, "incremental": 3, "modular": 3, "report": 4, "__init__": 5,
}  # fmt: skip
HEAVY = ("tensorflow_datasets", "sklearn", "matplotlib", "orbax", "grain", "PIL")
FILES = sorted((ROOT / "compo_jax").rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield ".".join(
                    ["compo_jax", *path.relative_to(ROOT / "compo_jax").parts[: -node.level], node.module or ""]
                )
            else:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_from_floors_below(path):
    room = path.relative_to(ROOT / "compo_jax").parts[0].removesuffix(".py")
    for name in imports(path):
        assert not name.startswith("experiments")
        parts = name.split(".")
        if parts[0] == "compo_jax" and len(parts) > 1 and parts[1] in FLOORS and parts[1] != room:
            assert room in FLOORS, f"{room} has no floor"
            assert FLOORS[parts[1]] < FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {name}"


def test_only_the_pool_and_the_checkpoints_know_orbax():
    knowing = {str(p.relative_to(ROOT / "compo_jax")) for p in FILES if any(i.startswith("orbax") for i in imports(p))}
    assert {p.split("/")[0] for p in knowing} <= {"pool", "train"}
    assert "train/checkpoints.py" in knowing


def test_curvature_compose_and_tree_know_no_flax():
    for path in FILES:
        if path.relative_to(ROOT / "compo_jax").parts[0] in ("curvature", "compose", "tree.py"):
            assert not any(name.startswith("flax") for name in imports(path)), path


def test_a_tree_s_type_has_one_definition():
    named = {p.name for p in FILES for node in ast.walk(ast.parse(p.read_text())) if defines(node, "Tree")}
    assert named == {"tree.py"}


def defines(node, name):
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)


@pytest.mark.parametrize("room", sorted(path.parent.name for path in (ROOT / "compo_jax").glob("*/__init__.py")))
def test_no_file_is_called_what_its_room_exports(room):
    folder = ROOT / "compo_jax" / room
    face = ast.parse((folder / "__init__.py").read_text())
    imported = [node for node in face.body if isinstance(node, ast.ImportFrom)]
    # what is imported from the room itself is a file that is passed on as one, as `modular.routes` is
    exported = {alias.asname for node in imported if node.module != f"compo_jax.{room}" for alias in node.names}
    exported |= {node.name for node in face.body if isinstance(node, ast.FunctionDef)}
    assert exported and not exported & {path.stem for path in folder.glob("*.py")}


def test_the_face_names_every_room():
    rooms = FLOORS.keys() - {"__init__"}
    assert {path.relative_to(ROOT / "compo_jax").parts[0].removesuffix(".py") for path in FILES} == FLOORS.keys()
    assert rooms <= set(dir(compo_jax)) and set(compo_jax._ROOMS) == rooms
    assert rooms == {name.split(".")[1] for name in imports(ROOT / "compo_jax" / "__init__.py") if "compo_jax" in name}
    told, floor = {}, None
    for number, room in re.findall(r"^    (\d| )      (\w+)  ", compo_jax.__doc__, re.MULTILINE):
        floor = int(number) if number.strip() else floor
        told[room] = floor
    assert told == {room: FLOORS[room] for room in rooms}
    with pytest.raises(AttributeError, match="module 'compo_jax' has no attribute 'curvatures'"):
        compo_jax.curvatures  # noqa: B018
    assert compo_jax.__version__ == importlib.metadata.version("compo-jax")


def test_a_room_is_loaded_when_touched_and_loads_nothing_heavy():
    """In one process, from below, so that what is loaded is told of the first room that loads it."""
    rooms = ["curvature", "compose", "pool", "adapters", "data", "models", "train", "incremental", "modular"]
    code = f"""
import json, sys
import compo_jax as cj
assert not [name for name in sys.modules if name.startswith("compo_jax.")] and "jax" not in sys.modules
loaded = {{}}
for room in {rooms}:
    getattr(cj, room)
    loaded[room] = [name for name in {[*HEAVY, "safetensors", "flax", "optax", "scipy"]} if name in sys.modules]
assert callable(cj.curvature.hvp) and cj.curvature is sys.modules["compo_jax.curvature"]
print(json.dumps(loaded))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = json.loads(done.stdout)
    assert not loaded["curvature"] and not loaded["compose"] and not loaded["pool"]
    assert not {name: set(found) & set(HEAVY) for name, found in loaded.items() if set(found) & set(HEAVY)}
