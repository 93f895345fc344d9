"""YAML of other people, read as plain values within bounds, for configurations, plans, profiles and records."""

import re
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 200_000  # of a file: a whole recorded configuration has 5,000
MAX_VALUES = 50_000  # of a file, those behind aliases counted each time
MAX_DEPTH = 50
PLAIN_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})")
# What PyYAML raises for a value that is none of its tag, as in ``!!int ""``, or for nesting.
WRONG_VALUES = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds; raises yaml.YAMLError for a key given twice and for more than the bounds allow.

    What YAML reads in another base than 10 (010, 1:30, 0x10), and numbers of 19 digits and more, are text.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    except WRONG_VALUES as error:
        problem = " ".join(str(error).split())
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=getattr(loader, "mark", None)) from error
    finally:
        loader.dispose()


def read_text(path: Path) -> str:
    """Return the text of a YAML file; raises OSError, or ValueError for what is no text, no file, or too large.

    A pipe is read where a shell opened it, as in ``--cfg <(COMMAND)``; others may have no one who writes to them.
    """
    if path.exists() and not path.is_dir() and not path.is_file() and not (path.is_fifo() and path.parts[1] == "dev"):
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    return content.decode("utf-8")


class _Loader(yaml.SafeLoader):
    """A loader of YAML that refuses a key given twice, where YAML would keep the last one only."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        self.mark = node.start_mark  # where it is, should it be wrong
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, yaml.ScalarNode] = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if first.setdefault(key.value, key) is not key:
                mark = first[key.value].start_mark
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=mark)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if isinstance(text, str) and ("\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text)):
            raise ValueError("a text with a zero byte or half a letter")
        return text

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        is_integer = node.tag.endswith(":int")
        if (is_integer and not PLAIN_INTEGER.fullmatch(node.value)) or ":" in node.value or "_" in node.value:
            return self.construct_scalar(node)
        return self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)


for kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _Loader.construct_number)


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return how many values a node has, also behind aliases; raises ValueError beyond MAX_DEPTH or MAX_VALUES."""
    if id(node) not in known:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inside = [one for part in parts for one in (part if isinstance(part, tuple) else [part])]
        known[id(node)] = 1 + sum(_count(one, known, depth + 1) for one in inside)
        if known[id(node)] > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values, those behind aliases included")
    return known[id(node)]
