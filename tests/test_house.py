"""The rooms of `fkv`: which may use which, and how large functions and files may be."""

import ast
from pathlib import Path

import fkv

HOME = Path(fkv.__file__).parent
# Each room may use those of the lines above it, and what stands beside it.
ROOMS = (
    ("commands", "errors", "files", "hub", "keys", "kinds", "recipes"),
    ("models", "tasks"),
    ("cache", "data"),
    ("policies",),
    ("runs", "engine"),
    ("learning",),
    ("evaluation", "api"),
    ("serve", "context", "judge", "harness"),
    ("jobs",),
)
BESIDE = {
    ("files", "errors"), ("keys", "errors"), ("kinds", "errors"), ("files", "kinds"),
    ("recipes", "errors"), ("recipes", "files"),
}  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
PARAMETERS, LINES, SECTION_LINES = 7, 500, 350


def modules() -> dict[str, Path]:
    """Modules by their dotted names."""
    found = {}
    for path in sorted(HOME.rglob("*.py")):
        parts = path.relative_to(HOME.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Modules of `fkv` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return {name for name in found if name in MODULES and name != "fkv"}


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_is_in_a_room():
    assert {room(name) for name in MODULES if name != "fkv"} == set(LEVEL)


def test_no_arrow_points_up():
    wrong = [
        f"{name} -> {used}"
        for name, uses in IMPORTS.items()
        for used in uses
        if name != "fkv" and room(name) != room(used) and LEVEL[room(name)] <= LEVEL[room(used)]
        and (room(name), room(used)) not in BESIDE
    ]  # fmt: skip
    assert not wrong, wrong


def test_no_imports_go_in_a_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for used in sorted(IMPORTS[name] - {name}):
            visit(used)
        done.add(path.pop())

    for name in MODULES:
        visit(name)


def test_functions_take_few_parameters():
    """Those of `fkv.api` and its neighbours are settings for notebooks."""
    wrong = {}
    for name in set(MODULES) - {"fkv.api", "fkv.context", "fkv.judge"}:
        for node in ast.walk(ast.parse(MODULES[name].read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([x for x in taken if x.arg not in ("self", "cls")])
                if count > PARAMETERS:
                    wrong[f"{name}.{getattr(node, 'name', 'lambda')}"] = count
    assert not wrong


def test_files_are_short():
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    most = {name: SECTION_LINES if ".benchmark" in name else LINES for name in lines}
    assert not {name: count for name, count in lines.items() if count > most[name]}


def test_one_place_asks_which_platform_this_is():
    found = [name for name, path in MODULES.items() if "default_backend" in path.read_text()]
    assert found == ["fkv.runs.parallel"]
