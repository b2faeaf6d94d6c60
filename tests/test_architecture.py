"""The rules of the house, held over the syntax tree: who imports whom, who touches the disk, who prints."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minillm

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minillm"
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name.removesuffix(".__init__"): ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}

# From the ground up: a room may import from its own floor and from those below it.
FLOORS = (
    ("errors", "units", "version", "cgroups", "shard"),
    (
        "config",
        "cores",
        "lookup",
        "headers",
        "layer_budget",
        "lsh",
        "machine",
        "memory",
        "sampling",
        "text",
        "vocabulary",
        "sandbox",
    ),
    ("slots", "cache", "eviction", "quant"),
    ("policies", "backends", "tokenizer", "chat"),
    ("model", "budget"),
    ("fused",),
    ("generate", "inventory", "loader", "parallel", "snapshot", "fingerprint"),
    ("planner", "ahead", "download"),
    ("hub", "engine"),
    ("checkpoint", "results", "answer", "stream", "saved", "session"),
    ("llm", "shapes", "breakdown", "bench"),
    ("conversation",),
    ("",),  # minillm/__init__.py
    ("cli", "server", "lab"),
    ("__main__",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}

DISK_ROOMS = {
    "loader",
    "headers",
    "inventory",
    "hub",
    "download",
    "tokenizer",
    "vocabulary",
    "chat",
    "snapshot",
    "fingerprint",
}
USERS_FILES = {"minillm.cli.prompt_text", "minillm.cli.trace", "minillm.lab.tasks", "minillm.lab.cases"}
USERS_FILES |= {"minillm.lab.tables", "minillm.lab.store"}
USERS_FILES |= {"minillm.cli.serve", "minillm.server.sessions", "minillm.server.app"}  # a key, sessions, the page
USERS_FILES |= {"minillm.cgroups", "minillm.machine"}  # /proc
DISK_METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "iterdir", "mkdir", "unlink", "touch", "rmdir"}
DISK_OS = re.compile(
    r"os\.(remove|unlink|rename|replace|mkdir|makedirs|listdir|scandir|walk|stat)|(shutil|tempfile|mmap)\.\w+"
)


def room(module: str) -> str:
    """minillm.policies.window -> policies; minillm -> ''."""
    return ".".join(module.split(".")[1:2])


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from runtime_nodes(node)


def imported(module: str) -> set[str]:
    """Full names of the modules (of ours and others) that a module imports when it runs."""
    package = module if FILES.get(f"{module}.__init__") else module.rpartition(".")[0]
    found: set[str] = set()
    for node in runtime_nodes(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES or origin == "torch" else origin for name in names}
    return found


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_imports_run_one_way() -> None:
    graph: dict[str, set[str]] = {}
    for module in TREES:
        assert room(module) in FLOOR, f"{module} has no place yet: give {room(module)} a floor in this test"
        graph[module] = {name for name in imported(module) if name in TREES and name != module}
        for target in graph[module]:
            same_package = room(module) == room(target)
            assert same_package or FLOOR[room(target)] <= FLOOR[room(module)], f"{module} must not import {target}"
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_the_rules_can_fail() -> None:
    """The helpers see what they are meant to see."""
    assert "minillm.errors" in imported("minillm.sampling")
    assert "minillm.budget" not in imported("minillm")  # TYPE_CHECKING only
    assert "minillm" in imported("minillm.cli.main")
    assert "torch" in imported("minillm.sampling")


def test_only_some_rooms_touch_the_disk() -> None:
    for module in TREES:
        if room(module) in DISK_ROOMS or module in USERS_FILES:
            continue
        for function, call in calls(module):
            method = function.rpartition(".")[2]
            mode = ast.literal_eval(call.args[0]) if call.args and isinstance(call.args[0], ast.Constant) else ""
            opens = function == "open" or (method == "open" and re.fullmatch("[rwxab+t]+", str(mode)))
            assert not opens, f"{module} opens a file"
            assert "." not in function or method not in DISK_METHODS, f"{module} calls {function}"
            assert not DISK_OS.fullmatch(function), f"{module} calls {function}"


def test_only_the_command_line_and_the_server_print_or_log() -> None:
    for module, tree in TREES.items():
        if room(module) in ("cli", "server", "__main__"):
            continue
        assert "logging" not in imported(module)
        assert "print" not in {function for function, _ in calls(module)}, f"{module} prints"
        if room(module) != "sandbox":  # a process of its own, whose answer is its stdout
            written = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not written & {"sys.stdout", "sys.stderr"}, f"{module} writes to the terminal"


def test_special_imports_stay_in_their_rooms() -> None:
    for module in TREES:
        names, functions = imported(module), {function for function, _ in calls(module)}
        if room(module) != "backends":
            assert not any(name.split(".")[0] == "triton" for name in names), f"{module} imports triton"
            assert not functions & {"torch.compile", "torch.jit.script"}, f"{module} compiles"
        if room(module) != "parallel":
            assert not any(name.startswith("torch.distributed") for name in names), (
                f"{module} imports torch.distributed"
            )
            assert not any(function.startswith("torch.distributed") for function in functions)
        assert not names & {"pickle", "numpy"}, f"{module} imports {names & {'pickle', 'numpy'}}"


def test_nothing_is_probed_and_the_environment_is_read_at_the_top_only() -> None:
    for module, tree in TREES.items():
        for function, call in calls(module):
            probes = function == "hasattr" or (function == "getattr" and len(call.args) > 2)
            assert not probes or room(module) == "config", f"{module} probes: {ast.unparse(call)}"
        read = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert room(module) in ("cli", "server") or not read & {"os.environ", "os.getenv"}, f"{module} reads os.environ"


def test_a_model_in_a_folder_needs_nothing_of_the_hub() -> None:
    code = "import sys; from minillm import LLM; LLM.load().generate('Once', max_tokens=1); print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, cwd=ROOT)
    assert not set(answer.stdout.split()) & {"huggingface_hub", "httpx", "requests"}


def test_import_minillm_is_light() -> None:
    code = "import sys, minillm; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, cwd=ROOT)
    loaded = set(answer.stdout.split())
    assert "minillm.errors" in loaded
    assert not loaded & {"torch", "triton", "torch.distributed", "tokenizers", "huggingface_hub", "jinja2", "numpy"}


def test_public_names_are_complete_and_explained() -> None:
    errors = {name for name, item in vars(minillm.errors).items() if inspect.isclass(item)}
    assert set(minillm.__all__) == errors | set(minillm._HOMES) | {"__version__"}
    assert set(dir(minillm)) >= set(minillm.__all__)
    typed = {
        alias.asname
        for node in ast.walk(TREES["minillm"])
        if isinstance(node, ast.If)
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert typed >= set(minillm._HOMES)
    for name in set(minillm.__all__) - {"__version__"}:
        item = getattr(minillm, name)
        assert item.__name__ == name
        assert inspect.getdoc(item), f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no_such_name"):
        minillm.no_such_name  # noqa: B018


def test_modules_classes_and_functions_have_docstrings() -> None:
    for module, tree in TREES.items():
        assert ast.get_docstring(tree), f"{module} does not say what it is for"
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


def test_files_are_rooms_one_person_can_hold_in_mind() -> None:
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in FILES.items()}
    for name, length in sorted(lengths.items(), key=lambda item: -item[1]):
        print(f"{length:5} {name}")
    print(f"{sum(lengths.values()):5} lines in {len(lengths)} files")
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_wheel_carries_the_package_and_the_weights(tmp_path: Path) -> None:
    builders = pytest.importorskip("hatchling.builders.wheel", reason="hatchling comes with the test extra")
    wheel = next(builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    inside = set(zipfile.ZipFile(wheel).namelist())
    shipped = {
        path.relative_to(ROOT).as_posix()
        for folder in (PACKAGE, ROOT / "weights")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert "minillm/py.typed" in inside
    assert inside >= {re.sub("^weights/", "minillm/weights/", file) for file in shipped}
    assert not [name for name in inside if not name.startswith(("minillm/", f"minillm-{minillm.__version__}"))]
