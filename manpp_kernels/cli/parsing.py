"""Options made from the fields of dataclasses, so that a default, a type and a description have one home.

An option of a command line and a key of a configuration file are read by the same parser: the file is turned into the
words of a command line first.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


class UserError(Exception):
    """A request that cannot be met; its message is one sentence that says why, shown without a traceback."""


def check_writable(option: str, path: Path, what: str) -> None:
    """Raise where no file can be written to the path that an option names; its folder is made."""
    from manpp_kernels.checkpoint import check_place

    try:
        check_place(path, what)
    except OSError as error:
        raise UserError(f"{option}: {error}") from error


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions, and which takes no abbreviated options."""

    def __init__(self, *, description: str | None = None, **options: Any) -> None:
        # Descriptions are docstrings of modules, which mark commands as code.
        super().__init__(allow_abbrev=False, description=(description or "").replace("``", ""), **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def option_strings(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remark that names the near misses of ``word``; empty where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def option(default: Any, text: str, *, minimum: float | None = None, metavar: str | None = None) -> Any:
    """A dataclass field that is an option of the command line."""
    metadata = {"help": text, "minimum": minimum, "metavar": metavar}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def key(name: str) -> str:
    """A field's name as an option and a key of a configuration file."""
    return name.replace("_", "-")


@dataclasses.dataclass
class Option:
    """An option as a dataclass's field describes it."""

    name: str
    kinds: list[Any]
    text: str
    minimum: float | None = None
    metavar: str | None = None


def options_of(config: type) -> list[Option]:
    """The fields of a dataclass as options, described by their metadata or by the class's docstring."""
    hints = typing.get_type_hints(config)
    texts = _descriptions(config)
    found = []
    for field in dataclasses.fields(config):
        data = field.metadata
        text = data.get("help") or texts.get(field.name, "")
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default not in (None, {}, dataclasses.MISSING):
            text += f" [{_shown(default)}]"
        found.append(Option(field.name, _members(hints[field.name]), text, data.get("minimum"), data.get("metavar")))
    return found


def _descriptions(config: type) -> dict[str, str]:
    """What the section Attributes of a dataclass's docstring says about its fields."""
    texts: dict[str, str] = {}
    names = {field.name for field in dataclasses.fields(config)}
    docs = [part.__doc__ or "" for part in reversed(config.__mro__) if dataclasses.is_dataclass(part)]
    current: list[str] = []
    for line in "\n\n".join(docs).splitlines():
        before, colon, text = line.strip().partition(":")
        heads = before.split(", ")  # one description may be that of several fields
        if colon and names.issuperset(heads):
            current = heads
            texts.update(dict.fromkeys(heads, text.strip()))
        elif not line.strip():
            current = []
        else:
            texts.update({head: f"{texts[head]} {line.strip()}" for head in current})
    return {name: re.sub(r"``|:\w+:|`", "", text) for name, text in texts.items()}


def add_option(parser: argparse._ActionsContainer, spec: Option) -> None:
    """Add an option to a parser; where it is not given, it leaves no trace in the result."""
    flag = f"--{key(spec.name)}"
    common: dict[str, Any] = {"dest": spec.name, "default": argparse.SUPPRESS, "help": spec.text.replace("%", "%%")}
    if bool in spec.kinds:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    elif any((typing.get_origin(kind) or kind) in (dict, Mapping, Any) for kind in spec.kinds):
        parser.add_argument(flag, action=_Pairs, metavar="NAME=VALUE", **common)
    else:
        metavar = spec.metavar or _metavar(spec.kinds)
        parser.add_argument(flag, type=_Converter(spec.kinds, spec.minimum), metavar=metavar, **common)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _members(hint: Any) -> list[Any]:
    """The types that a hint allows, unions and Literals taken apart (a Literal into its values)."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(hint) for member in _members(part)]
    return list(typing.get_args(hint)) if origin is typing.Literal else [hint]


def _is_sequence(kind: Any) -> bool:
    return typing.get_origin(kind) in (tuple, list, Sequence)


def _metavar(kinds: list[Any]) -> str | None:
    values = [kind for kind in kinds if isinstance(kind, str)]
    if values:
        return "{" + ",".join(values) + "}"
    names = {int: "N", float: "X", Path: "PATH"}
    return next((names[kind] for kind in kinds if kind in names), None)


class _Converter:
    """Turns the word after an option into the first of the allowed types that it fits."""

    def __init__(self, kinds: list[Any], minimum: float | None) -> None:
        self.kinds, self.minimum = kinds, minimum

    def __call__(self, word: str) -> Any:
        if type(None) in self.kinds and word == "none":
            return None
        if word in [kind for kind in self.kinds if isinstance(kind, str)]:
            return word
        for kind, convert in (
            (int, int),
            (float, float),
            (Path, Path),
            *((kind, _elements(kind)) for kind in self.kinds if _is_sequence(kind)),
            (str, str),
        ):
            if kind in self.kinds:
                try:
                    value = convert(word)  # type: ignore[operator]
                except (ValueError, argparse.ArgumentTypeError):
                    continue
                if isinstance(value, float) and not math.isfinite(value):
                    raise argparse.ArgumentTypeError(f"has to be a finite number, and is {word}")
                if isinstance(value, int | float) and self.minimum is not None and not value >= self.minimum:
                    raise argparse.ArgumentTypeError(f"has to be {self.minimum} or more, and is {word}")
                return value
        raise argparse.ArgumentTypeError(f"has to be {self._described()}, and is {word!r}{self._near(word)}")

    def _near(self, word: str) -> str:
        return did_you_mean(word, [kind for kind in self.kinds if isinstance(kind, str)])

    def _described(self) -> str:
        names = {int: "a whole number", float: "a number", type(None): "none"}
        parts = [kind if isinstance(kind, str) else names.get(kind) for kind in self.kinds]
        parts += ["several with commas between" for kind in self.kinds if _is_sequence(kind)]
        return " or ".join(part for part in parts if part)


def _elements(kind: Any) -> Callable[[str], Any]:
    """Converts words with commas between; a comma at the end makes a sequence of a single element."""
    convert = _Converter(_members(typing.get_args(kind)[0]), None)
    return lambda word: tuple(convert(part) for part in word.removesuffix(",").split(","))


class _Pairs(argparse.Action):
    """``--option NAME=VALUE``, once or several times, gathered in a dict."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        name, separator, word = str(values).partition("=")
        if not name or not separator:
            raise UserError(f"argument {option_string}: has to be NAME=VALUE, and is {values!r}")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), name: _literal(word)})


def _literal(word: str) -> Any:
    """A number, a truth value, a tuple of them, or else the word itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(word, word))
    except (ValueError, SyntaxError):
        return word


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML (``.yaml``, ``.yml``) or TOML (``.toml``) file."""
    readers = {".yaml": _read_yaml, ".yml": _read_yaml, ".toml": _read_toml}
    if path.suffix not in readers:
        raise UserError(f"{path} has to end in {', '.join(readers)}")
    try:
        content = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} has to hold keys and values, as in 'epochs: 10'")
    return {str(name): value for name, value in content.items()}


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _read_toml(text: str) -> Any:
    try:
        import tomllib
    except ImportError as error:
        raise UserError("a TOML file needs Python 3.11 or later; write it as YAML") from error
    return tomllib.loads(text)


def parse_config(content: Mapping[str, Any], parser: Parser, source: Path | str) -> argparse.Namespace:
    """Values of a configuration file, checked by the parser of the command line whose long options its keys are."""
    options = {name[2:] for name in parser.option_strings() if name.startswith("--")} - {"help"}
    words: list[str] = []
    for name, value in content.items():
        option = key(name)
        if option not in options:
            raise UserError(f"{source}: there is no option {name!r}{did_you_mean(option, options)}")
        words += _as_words(option, value)
    try:
        return parser.parse_args(words)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _as_words(option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, Mapping):
        return [f"--{option}={name}={item}" for name, item in value.items()]
    if isinstance(value, list | tuple):
        return [f"--{option}={','.join(map(str, value))},"]
    return [f"--{option}={'none' if value is None else value}"]
