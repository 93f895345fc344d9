"""All commands of the package: ``stvit-video COMMAND ...``, or ``python -m stvit_video COMMAND ...``."""

import ast
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from stvit_video import __path__, __version__
from stvit_video.common.cli import PROGRAM, called_as, run_command
from stvit_video.common.errors import UsageError, nearest


def find_commands() -> dict[str, str]:
    """Return the module of each command by the command's name: all modules beside this one, and that of SLURM."""
    beside = [module.name for module in iter_modules(__path__) if not module.ispkg and module.name != "__main__"]
    return {name.replace("_", "-"): name for name in beside} | {"slurm": "slurm.cli"}


def describe_commands() -> str:
    """Return a line on each command: the beginning of its module's docstring, read without importing the module."""
    lines = []
    for command, module in sorted(find_commands().items()):
        source = Path(__path__[0], *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(source)) or ""
        lines.append(f"  {command:14}{about.splitlines()[0].partition(': ``')[0].rstrip('.')}")
    use = f"{called_as() or PROGRAM} COMMAND"
    return "\n".join([f"use: {use} ...\n", *lines, "", f"{use} --help says what a command takes."])


def dispatch(arguments: Sequence[str] | None) -> int:
    """Run the command that the first word names; print all commands where there is none. Return the exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    commands = find_commands()
    if name in ("-h", "--help", "--version"):
        print(f"stvit_video {__version__}" if name == "--version" else describe_commands())
        return 0
    module = commands.get(name.replace("_", "-"))
    if module is None:
        meant = nearest(name, commands)
        raise UsageError(f"{name} is no command; give one of {', '.join(sorted(commands))}.{meant}")
    return int(import_module(f"stvit_video.{module}").main(rest))


main = partial(run_command, dispatch)

if __name__ == "__main__":
    sys.exit(main())
