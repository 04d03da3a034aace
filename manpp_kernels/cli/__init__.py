"""The command ``manpp``. Each subcommand is a module here, imported when it is asked for: ``add_parser``, ``run``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from manpp_kernels.cli.parsing import Parser, UserError, did_you_mean

COMMANDS = {
    "train": "train a network, by local learning or end to end",
    "compare": "train several variants alike, and put them side by side",
    "report": "draw what went on in a run, block by block",
    "demo": "compare MAN++ with end-to-end training on the digits, in a few minutes on a CPU",
    "bench": "run the benchmarks of a checkout",
    "doctor": "say which backends work here, and why another does not",
}

# What the extra "train" of this package brings; `manpp doctor` runs without.
TRAIN_PACKAGES = {"torchvision", "PIL", "sklearn", "rich", "matplotlib", "safetensors", "tensorboard", "yaml"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``manpp``; returns the exit code: 0, 1 where a check failed, 2 for a wrong request, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    asked = words[0] if words else None
    name = f"manpp {asked}" if asked in COMMANDS else "manpp"
    try:
        return _dispatch(asked, words)
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in TRAIN_PACKAGES:
            raise
        print(f"{name}: error: this needs {error.name}: pip install 'manpp-kernels[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def _dispatch(asked: str | None, words: list[str]) -> int:
    parser = Parser(prog="manpp", description="Gradient-isolated training made practical.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    module = None
    for command, description in COMMANDS.items():
        if command == asked:
            module = importlib.import_module(f"manpp_kernels.cli.{command}")
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(command, help=description)
    if asked is None:
        parser.print_help()
        return 2
    if module is None and not asked.startswith("-"):
        raise UserError(
            f"there is no command {asked!r}{did_you_mean(asked, COMMANDS)}; there are {', '.join(COMMANDS)}"
        )
    args, unknown = parser.parse_known_args(words)
    if unknown:
        options = subparsers.choices[args.command].option_strings() if args.command else []
        option = unknown[0].split("=")[0]
        raise UserError(f"there is no option {option}{did_you_mean(option, options)}")
    if module is None:
        raise UserError("name a command: " + ", ".join(COMMANDS))
    return int(module.run(args))
