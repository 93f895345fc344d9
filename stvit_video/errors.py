"""The errors a user can cause, apart from the ones that would be our own mistake."""

import argparse
import difflib
from typing import NoReturn


class UsageError(ValueError):
    """Wrong use or configuration: the message says what was given, what is allowed and what to do.

    The command line prints it as one line and exits with code 2.
    """


def nearest(name: str, known: list[str]) -> str:
    """Return ``name``'s closest match among ``known`` as a question, or an empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {match[0]}?" if match else ""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, which ends in what to write: ``form``, after the program's name."""

    def __init__(self, *, prog: str, form: str, description: str) -> None:
        super().__init__(prog=prog, description=description)
        self.form = form

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; use: {self.prog} {self.form} (--help says more)")
