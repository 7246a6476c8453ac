"""The house's order: a room imports only from floors below it, and nothing imports experiments."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "tree": 0, "files": 0, "mesh": 0, "lapack": 0, "memory": 0, "data": 1, "models": 1, "adapters": 1, "curvature": 1,
    "compose": 2, "train": 2, "pool": 2, "incremental": 3, "modular": 3, "report": 4,
}  # fmt: skip
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
