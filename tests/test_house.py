"""The order of the package: which folder imports which, how long files and functions are, who takes a configuration."""

import ast
from collections.abc import Iterator

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "stvit_video"
# Each folder imports only from itself and from those before it. The commands at the top import from any.
ROOMS = (
    *("common", "models", "config", "runtime", "data", "runs", "evaluation", "inference", "training", "pages"),
    *("benchmarks", "slurm", "sweeps"),
)
FILE_LINES, FUNCTION_LINES, COMMAND_LINES, CONSTRUCTOR_ARGUMENTS = 400, 60, 105, 16
MODULES = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def check(wrong: dict[str, str]) -> None:
    """Make sure that nothing is wrong; ``wrong`` maps a name to what is wrong with it."""
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


def room(module: str) -> str:
    """Return the folder of a module, "command" for one at the top of the package, "" for the package itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return ""
    return parts[1] if len(parts) > 2 or (PACKAGE / parts[1]).is_dir() else "command"


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Yield the package's modules that a module imports, wherever it does, with the line."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "stvit_video")


def functions(module: str) -> Iterator[tuple[str, Function]]:
    """Yield the functions of a module, nested ones too, each with the names that lead to it."""

    def visit(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield ".".join((*names, child.name)), child
            inner = (*names, child.name) if isinstance(child, Function | ast.ClassDef) else names
            yield from visit(child, inner)

    return visit(TREES[module], ())


def arguments(function: Function) -> list[str]:
    found = function.args
    return [argument.arg for argument in (*found.posonlyargs, *found.args, *found.kwonlyargs)]


def test_folders_import_only_what_stands_before_them() -> None:
    assert {room(module) for module in MODULES} == {"", "command", *ROOMS}
    wrong = {}
    for module in MODULES:
        here = room(module)
        for name, line in imports(module):
            there = room(name)
            upward = here in ROOMS and there in ROOMS and ROOMS.index(there) > ROOMS.index(here)
            of_command = there == "command" and name != module
            beyond_errors = here == "models" != there and name != "stvit_video.common.errors"
            if upward or of_command or beyond_errors:
                wrong[f"{module} {name}"] = f"imported in line {line}"
    check(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {module: {name for name, _ in imports(module)} - {module} for module in MODULES}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"in circles, or importing from them: {sorted(left)}"


def test_files_and_functions_stay_short() -> None:
    wrong = {}
    for module, path in MODULES.items():
        lines = len(path.read_text().splitlines())
        most = COMMAND_LINES if room(module) == "command" else FILE_LINES
        if lines > most:
            wrong[module] = f"{lines} lines, at the most {most}"
        for name, function in functions(module):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > FUNCTION_LINES:
                wrong[f"{module}.{name}"] = f"{lines} lines, at the most {FUNCTION_LINES}"
            count = len(arguments(function)) - 1
            if function.name == "__init__" and count > CONSTRUCTOR_ARGUMENTS:
                wrong[f"{module}.{name}"] = f"{count} arguments, at the most {CONSTRUCTOR_ARGUMENTS}"
    check(wrong)


def reads_configuration(function: Function) -> bool:
    """Return whether a function takes ``cfg`` or reads an attribute ``.cfg``; that of parsed options is a path."""
    if "cfg" in arguments(function):
        return True
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "cfg"
        and isinstance(node.ctx, ast.Load)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("args", "options"))
        for node in ast.walk(function)
    )


def test_only_what_builds_or_opens_takes_a_configuration() -> None:
    """All else takes plain values, so that it can be used, and tested, without one."""
    wrong = {}
    for module in MODULES:
        if room(module) == "config":
            continue
        for name, function in functions(module):
            builds = any(part.lstrip("_").startswith(("build_", "open_")) for part in name.split("."))
            if not builds and reads_configuration(function):
                wrong[f"{module}.{name}"] = f"takes or reads a configuration in line {function.lineno}"
    check(wrong)
