"""Arrows go one way: methods know torch, the encoder transformers, a host its framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llava_hvp

PACKAGE = Path(llava_hvp.__file__).parent
HOSTS = {"llava", "transformers"}


def hosts_loaded_by(statement):
    """Which hosts a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint([m for m in {sorted(HOSTS)} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin"},
    )
    return set(ast.literal_eval(result.stdout.splitlines()[-1]))


def test_importing_the_package_loads_no_host():
    names = ", ".join(llava_hvp.__all__)
    assert (
        hosts_loaded_by(f"from llava_hvp import {names}\nget_method('hivtp', r_max=0.5)") == set()
    )


def test_the_check_sees_a_host_that_is_loaded():
    assert hosts_loaded_by("import llava_hvp.hosts.llava.host") == HOSTS
    assert hosts_loaded_by("import llava_hvp.hosts.hf.host\nimport transformers") == {
        "transformers"
    }


# From the lowest floor up. A room, or a file of the root, may import what lies on lower floors.
FLOORS = (
    {"errors", "version", "console", "files", "tables", "lazy"},
    {"methods", "shapes", "testing"},
    {"runtime"},
    {"options", "given", "tuned"},
    {"encoder", "decoder", "show", "config"},
    {"pruning"},
    {"hosts"},
    {"checkpoints"},
    {"evaluation"},
    {"hook", "lmms", "bench", "app"},
    {"accuracy", "tune"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
# Modules of other projects that a room may not import; `hosts` and `checkpoints` may all.
FOREIGN = {
    "errors version console files": {"torch", "transformers", "llava"},
    "methods runtime options given tuned config show decoder pruning": {"transformers", "llava"},
    "encoder testing hook lmms cli __init__": {"llava"},
    "shapes": {"torch", "transformers", "llava"},
    "evaluation bench accuracy tune app": {"transformers", "llava", "lmms_eval"},
}


def module_of(file):
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(file):
    """Every module that a file imports, inside functions and for types too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else node.module


def arrows():
    return list(_arrows())


def _arrows():
    for module, file in FILES.items():
        for name in imported(file):
            if name == "llava_hvp":
                name = "llava_hvp.__init__"
            if name in FILES and name != module:
                yield module, name


def room(module):
    return module.split(".")[1]


def floor(module):
    return next(n for n, rooms in enumerate(FLOORS) if room(module) in rooms)


def test_every_room_has_a_floor():
    rooms = {room(module) for module in FILES}
    assert rooms == set().union(*FLOORS)


def test_no_arrow_runs_back_up():
    upward = [
        f"{a} imports {b}"
        for a, b in arrows()
        if floor(b) > floor(a) or (floor(b) == floor(a) and room(a) != room(b))
    ]
    assert not upward, "\n".join(upward)


def test_no_circle_between_files():
    below: dict[str, set[str]] = {module: set() for module in FILES}
    for a, b in arrows():
        below[a].add(b)
    while True:
        # Neither what stands on nothing nor what nothing stands on is part of a circle.
        used = set().union(*below.values()) if below else set()
        free = {module for module, rest in below.items() if not rest or module not in used}
        if not free:
            break
        below = {module: rest - free for module, rest in below.items() if module not in free}
    assert not below, f"in circles: {below}"


def test_no_circle_between_the_folders_of_a_host():
    assert not [
        (a, b)
        for a, b in arrows()
        if ".compat" in a and ".hosts.llava." in b and ".compat" not in b
    ]


def test_a_host_knows_no_other_host():
    hosts = {m.split(".")[2] for m in FILES if m.startswith("llava_hvp.hosts.")}
    for a, b in arrows():
        if a.startswith("llava_hvp.hosts.") and b.startswith("llava_hvp.hosts."):
            assert len({a.split(".")[2], b.split(".")[2]} & hosts) == 1, f"{a} imports {b}"


def test_the_host_of_transformers_own_classes_needs_no_llava():
    files = [m for m in FILES if m.startswith(("llava_hvp.hosts.hf", "llava_hvp.checkpoints."))]
    own = [m for m in files if ".hf" in m or m.endswith((".convert", ".processors"))]
    assert len(own) > 10
    for module in own:
        for name in imported(FILES[module]):
            assert name.split(".")[0] != "llava", f"{module} imports {name}"
            assert not name.startswith("llava_hvp.hosts.llava"), f"{module} imports {name}"
    assert hosts_loaded_by("import llava_hvp.hosts.hf.host") <= {"transformers"}
    assert hosts_loaded_by("import llava_hvp.checkpoints.convert") == set()
    assert hosts_loaded_by("import llava_hvp.checkpoints.viewer") <= {"transformers"}
    assert hosts_loaded_by("import llava_hvp.cli.bench, llava_hvp.bench.subject") == set()


def test_no_room_imports_what_it_must_not_know():
    for module, file in FILES.items():
        for name in imported(file):
            forbidden = next(
                (f for rooms, f in FOREIGN.items() if room(module) in rooms.split()), ()
            )
            assert name.split(".")[0] not in forbidden, f"{module} imports {name}"


def test_the_checks_see_an_arrow_that_runs_up(monkeypatch, tmp_path):
    file = tmp_path / "masks.py"
    file.write_text("def f():\n    from llava_hvp.cli import run\n    import transformers\n")
    monkeypatch.setitem(FILES, "llava_hvp.methods.masks", file)
    with pytest.raises(AssertionError, match=r"methods\.masks imports llava_hvp\.cli\.run"):
        test_no_arrow_runs_back_up()
    with pytest.raises(AssertionError, match="in circles"):
        test_no_circle_between_files()
    with pytest.raises(AssertionError, match="transformers"):
        test_no_room_imports_what_it_must_not_know()


@pytest.mark.parametrize("part", ["methods", "encoder", "decoder", "pruning", "hosts"])
def test_no_size_of_one_tower_is_written_into_the_code(part):
    path = PACKAGE / part
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        numbers = {
            node.value
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, int)
        }
        assert not numbers & {576, 577, 335, 336, 2880}, file
