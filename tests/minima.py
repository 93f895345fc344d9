"""The least versions that setup.cfg allows, as constraints of pip: ``python tests/minima.py > constraints.txt``."""

import configparser
from pathlib import Path

from packaging.requirements import Requirement

SETUP = Path(__file__).parent.parent / "setup.cfg"


def requirements() -> list[Requirement]:
    """Return everything that setup.cfg requires, with its extras."""
    setup = configparser.ConfigParser()
    setup.read(SETUP, encoding="utf-8")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = [line for text in texts for line in text.splitlines() if line and not line.startswith("#")]
    return [Requirement(line) for line in lines]


def least(requirement: Requirement) -> str:
    """Return the least version that a requirement allows. Raises ValueError where it has no or several bounds below."""
    (version,) = [bound.version for bound in requirement.specifier if bound.operator in (">=", "==")]
    return version


def constraints() -> list[str]:
    """Return a line for each requirement that holds it at its least version."""
    found = {f"{one.name}=={least(one)}" + (f"; {one.marker}" if one.marker else ""): None for one in requirements()}
    return list(found)


if __name__ == "__main__":
    print("\n".join(constraints()))
