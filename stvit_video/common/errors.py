"""Errors that a user can cause, as opposed to bugs."""

import difflib
import errno
import re
from collections.abc import Iterable, Sequence

# System errors on which the user has to act: they are printed as one line.
FILESYSTEM_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}

# System errors for lack of something that is not a file's, and what it is.
SHORTAGES = {
    errno.ENOMEM: "memory",
    errno.EMFILE: "open files (ulimit -n)",
    errno.ENFILE: "open files of the whole machine",
    errno.EAGAIN: "processes or threads (ulimit -u, or the container's pids.max)",
}
# Of a GPU, of torch on the CPU, of the loader of shared libraries.
NO_MEMORY = "out of memory|can't allocate memory|failed to map segment"


class UsageError(ValueError):
    """Wrong use or configuration; the message says what was given, what is allowed and what to do.

    The command line prints it as one line and exits with code 2.
    """


class RunFailure(RuntimeError):
    """A run cannot continue for an external reason, which the message gives in one line; exit code 1."""

    goes_on = False  # whether the same command continues once the reason is gone


class Stopped(Exception):
    """A run was stopped by a signal; ``reached`` says how far it got, and all of that is saved."""

    def __init__(self, received: str | None, reached: str) -> None:
        by = received or "a signal to another process"
        super().__init__(f"stopped by {by} after {reached}; all of it is kept")


def describe_shortage(error: BaseException) -> str | None:
    """Return what the machine is short of, where an error says so; None for any other error."""
    text = first_line(error)
    if "No usable temporary directory" in text:
        return f"{text}; set TMPDIR to a folder that can be written to"
    number = error.errno if isinstance(error, OSError) else None
    if "can't start new thread" in text:
        number = errno.EAGAIN
    elif isinstance(error, MemoryError) or re.search(NO_MEMORY, text):
        number = errno.ENOMEM
    return f"out of {SHORTAGES[number]} ({text})" if number in SHORTAGES else None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for the ``known`` names most like ``name``, or an empty string."""
    found = find_nearest(name, known)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def find_nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three of the ``known`` names: those most like ``name``, which is none of them.

    First come names whose last part is the same (TRAIN.LR: OPTIM.LR), then those of its family, whose words begin alike
    (swin_t: swin_tiny), then the one that is spelt most alike. Case and dashes do not count, nor do single letters.
    """
    known = list(dict.fromkeys(known))
    if name in known or sum(map(str.isalpha, name)) < 2:
        return []
    found = sorted(((*_likeness(name, other), other) for other in known), key=lambda found: found[:2], reverse=True)
    best = [other for kin, _, other in found if kin == found[0][0] > (0, 0)]
    return best[: 1 if found and found[0][0] == (1, 0) else 3]


def _likeness(name: str, other: str) -> tuple[tuple[int, int], float]:
    """Return how a name is like another one, from (0, 0) for not at all, and how alike they are spelt."""
    (section, words), (other_section, other_words) = _parts(name), _parts(other)
    leaf, other_leaf = "_".join(words), "_".join(other_words)
    whole, other_whole = f"{section}.{leaf}".lstrip("."), f"{other_section}.{other_leaf}".lstrip(".")
    spelling = difflib.SequenceMatcher(None, whole, other_whole).ratio()
    leaf_spelling = difflib.SequenceMatcher(None, leaf, other_leaf).ratio()
    same_section = section == other_section
    if leaf == other_leaf:
        return (3, same_section), spelling
    initials = "".join(word[0] for word in words)  # LEARNING_RATE: LR
    if _share_words(words, other_words) or (len(words) > 1 and initials == other_leaf):
        leads = all(map(_begin_alike, words, other_words))
        return (2, 2 if same_section and section else leads), spelling
    # 0.67 is above gpu and cpu; in another section the last part alone has to be nearly the same.
    alike = leaf_spelling > 0.8 or (spelling > 0.67 and leaf_spelling > 0.5)
    return (alike, 0), max(spelling, leaf_spelling)


def _parts(name: str) -> tuple[str, list[str]]:
    """Return the section before the last part of a name, and the words of that part."""
    section, _, leaf = name.strip("-").lower().rpartition(".")
    return section, re.findall(r"[^-_/\s]+", leaf)


def _share_words(words: Sequence[str], known: Sequence[str]) -> bool:
    """Say whether the words of the shorter name stand in the same order in the longer; they may be cut short."""
    more = len(words) > len(known)
    left = iter(words if more else known)
    short = known if more else words
    return bool(short) and all(
        any(_begin_alike(other, one) if more else _begin_alike(one, other) for other in left) for one in short
    )


def _begin_alike(word: str, known: str) -> bool:
    """Say whether a word is a known one, cut short (b: base, 16: patch16; but 1 is not 11) or with something added."""
    if word == known:
        return True
    if word.isdigit():
        return known.endswith(word) and not known.isdigit()
    return known.startswith(word) or (len(known) > 2 and word.startswith(known))
