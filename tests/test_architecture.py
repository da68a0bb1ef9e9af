"""The house rules, read from the source: who may import whom, sizes, docstrings, exported names."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import taciturn

ROOT = Path(taciturn.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = ("partition", "participation", "codecs", "sync", "solvers", "aggregation", "server", "wire", "fleet", "precision")
# a later floor may import every earlier one; rooms that stand on one floor do not import each other
FLOORS = [
    {"core"},
    set(ROOMS),
    {"method"},
    {"client", "methods"},
    {"round", "sensitivity"},
    {"engines"},
    {"flower", "tasks"},
    {"experiment"},
    {"advisor", "report"},
    {"compare"},
    {"__init__"},
    {"cli"},
]
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
OPTIONAL = {
    "cryptography",
    "flwr",
    "peft",
    "pyarrow",
    "sklearn",
    "ray",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "opacus",
    "tensorboardX",
}  # imported where they are used, never at the top of a module


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, top_only: bool = False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "taciturn":
                yield from (f"taciturn.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def public_definitions(tree: ast.Module):
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"))


def test_every_room_has_a_floor():
    assert {room_of(path) for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    room = room_of(path)
    for name in imports(path):
        if name == "taciturn" or not name.startswith("taciturn."):
            assert name != "taciturn" or room in ("__init__", "cli"), f"{path} imports the facade"
            continue
        other = name.split(".")[1]
        if other not in LEVEL:  # `from taciturn import name` of the facade
            pytest.fail(f"{path} imports {name} through the facade")
        assert other == room or LEVEL[other] < LEVEL[room], f"{room} must not import {other} ({path.name})"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes_and_docstrings(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 400, f"{path}: {text.count(chr(10))} lines"
    assert ast.get_docstring(tree), f"{path}: no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 55, f"{path}: {node.name} is {node.end_lineno - node.lineno} lines"
    protocol = path.name == "types.py"
    for node in public_definitions(tree):
        bare = protocol or (isinstance(node, ast.FunctionDef) and node.body and isinstance(node.body[0], ast.Expr)
                            and getattr(node.body[0].value, "value", None) is ...)  # fmt: skip
        assert bare or ast.get_docstring(node), f"{path}: {node.name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_optional_packages_are_imported_lazily(path):
    assert not {name.split(".")[0] for name in imports(path, top_only=True)} & OPTIONAL


def test_ray_has_one_door():
    users = {str(path.relative_to(ROOT)) for path in FILES if "ray" in {name.split(".")[0] for name in imports(path)}}
    assert users == {"engines/ray.py"}


def test_flower_has_one_door():
    users = {str(path.relative_to(ROOT)) for path in FILES if "flwr" in {name.split(".")[0] for name in imports(path)}}
    assert users == {"engines/flower.py"}


def test_peft_has_one_door():
    users = {str(path.relative_to(ROOT)) for path in FILES if "peft" in {name.split(".")[0] for name in imports(path)}}
    assert users == {"partition/lora.py"}


def test_opacus_has_one_door():
    users = {str(path.relative_to(ROOT)) for path in FILES if "opacus" in {name.split(".")[0] for name in imports(path)}}
    assert users == {"experiment/privacy.py"}


def test_tensorboardx_has_one_door():
    users = {str(path.relative_to(ROOT)) for path in FILES if "tensorboardX" in {n.split(".")[0] for n in imports(path)}}
    assert users == {"report/scalars.py"}


def test_onnx_has_one_door():
    packages = {"onnx", "onnxruntime", "onnxscript"}
    users = {str(path.relative_to(ROOT)) for path in FILES if {name.split(".")[0] for name in imports(path)} & packages}
    assert users == {"precision/graph.py"}


def test_no_pickle_no_eval_from_the_network():
    for path in FILES:
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, path
        assert not re.search(r"(?<![.\w])(eval|exec)\(", path.read_text()), path
        assert "torch.load(" not in path.read_text(), path


def test_no_inheritance_among_parts():
    """A class is a Protocol, an exception, a record or final: nothing of ours inherits from anything of ours."""
    allowed = re.compile(r"Protocol|Function|Error|Exception|Optimizer|Module|Tracer|DispatchMode|KeyboardInterrupt")
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    assert allowed.search(ast.unparse(base)), f"{path}: {node.name}({ast.unparse(base)})"


def test_exported_names_are_sorted_complete_and_there():
    for name in (
        "",
        *ROOMS,
        "tasks.data",
        "tasks.models",
        "advisor",
        "report",
        "engines",
        "flower",
        "solvers.schedules",
        "sync.thresholds",
    ):
        module = importlib.import_module(f"taciturn.{name}".rstrip("."))
        assert list(module.__all__) == sorted(module.__all__), name
        for exported in module.__all__:
            assert getattr(module, exported).__doc__, f"{name}.{exported}"


def test_ten_protocols_and_no_more():
    tree = ast.parse((ROOT / "core" / "types.py").read_text())
    protocols = {n.name for n in tree.body if isinstance(n, ast.ClassDef) and "Protocol" in map(ast.unparse, n.bases)}
    assert protocols == {
        "Aggregator", "Clients", "Codec", "Engine", "Participation", "Partition", "ServerOptimizer", "Solver",
        "SyncRule", "Task",
    }  # fmt: skip


def test_the_round_fits_a_page():
    for name in ("round.py", "client.py"):
        assert (ROOT / name).read_text().count("\n") <= 150, name
