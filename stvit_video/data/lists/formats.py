"""A list is what its content says: a table, JSON, lines of paths and labels, or the split files of HMDB51."""

import glob
import os
import re
from pathlib import Path

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import LIST_FORM
from stvit_video.data.lists.catalogues import Catalogue, Entry
from stvit_video.data.lists.json_lists import read_json
from stvit_video.data.lists.lines import read_lines_list
from stvit_video.data.lists.tables import AS_IT_SAYS, Reading, read_header, read_table
from stvit_video.data.lists.text import check_lengths, read_lines

HMDB_FILE = re.compile(r"(.+)_test_split([1-3])\.txt")
HMDB_SUBSETS = {"1": "train", "2": "test"}  # 0: neither


def read_catalogue(path: str | Path, root: str | Path = "", reading: Reading = AS_IT_SAYS) -> Catalogue:
    """Read a list of any known form, or a pattern of files: HMDB51's split files, one for each class.

    Paths start from ``root``. Raises UsageError, naming the line or entry, where the list is damaged, without labels,
    or may mean several things.
    """
    if glob.has_magic(str(path)) and not os.path.exists(path):
        return _read_hmdb(path)
    if match := HMDB_FILE.fullmatch(Path(path).name):
        raise UsageError(
            f"List {path} holds one class of HMDB51's split {match[2]}; give the files of all classes by a pattern, as "
            f"in DATA.TRAIN_LIST '{Path(path).parent.name}/*_test_split{match[2]}.txt'."
        )
    lines = read_lines(path, "List", LIST_FORM)
    if lines and lines[0].lower().startswith("sep="):  # Excel's first line, which names the separator
        lines[0] = "\n"
    first = next((line for line in lines if line.strip()), "")
    # A bracket alone does not make it JSON: a path may begin with one.
    if str(path).lower().endswith((".json", ".jsonl")) or re.match(r"\s*(\[\s*(\{|$)|\{)", first):
        return read_json("".join(lines), path, reading)
    check_lengths(lines, f"List {path}")
    header = None if reading.columns else read_header(first)
    if header is not None:
        return read_table(lines, header, path, reading)
    return read_lines_list(lines, path, root, reading)


def _read_hmdb(pattern: str | Path) -> Catalogue:
    """Read files ``CLASS_test_splitN.txt`` with lines ``name.avi 0|1|2``: unused, training or test."""
    files = sorted(glob.glob(str(pattern)))
    matches = [HMDB_FILE.fullmatch(os.path.basename(file)) for file in files]
    splits = {match[2] for match in matches if match}
    if not files or not all(matches) or len(splits) > 1:
        found = f"{len(files)} files" + (f", the first {files[0]}" if files else "")
        raise UsageError(
            f"List {pattern} matches {found}; a pattern names all files of one of HMDB51's splits, as in "
            f"'testTrainMulti_7030_splits/*_test_split1.txt'."
        )
    entries = []
    for file, match in zip(files, matches, strict=True):
        assert match is not None
        for number, line in enumerate(read_lines(file, "List", LIST_FORM), start=1):
            name, _, subset = line.strip().rpartition(" ")
            if line.strip() and subset not in ("0", *HMDB_SUBSETS):
                raise UsageError(
                    f"List {file}, line {number}: {line.strip()[:80]!r}; give a file's name and 0, 1 or 2."
                )
            if subset in HMDB_SUBSETS:
                entries.append(Entry((f"{match[1]}/{name.strip()}",), (match[1],), subset=HMDB_SUBSETS[subset]))
    return Catalogue(pattern, entries)


def find_hmdb(folder: Path) -> str | None:
    """Return the name of one of HMDB51's split files in a folder; None where there is none."""
    return next((name for name in sorted(os.listdir(folder)) if HMDB_FILE.fullmatch(name)), None)
