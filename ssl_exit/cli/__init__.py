"""The command line: ssl-exit COMMAND, each with --help and --config; options are made from signatures and settings.

A command is a function in a module of its own, imported without torch, so that help and mistakes are answered at once.
Arguments annotated with a group of settings become the options of that group.
"""

import inspect
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TextIO, get_type_hints

from ssl_exit import __version__
from ssl_exit.errors import InputError, printable
from ssl_exit.settings import Group, options_of

ABOUT = "Label-free early exit for clustering with self-supervised encoders."
BUILDING = (
    "cluster",
    "train",
    "fit",
    "list-exits",
)  # take module:function of the user's, which may lie in the current folder
NEWLINE = "\n"
COMMANDS = ("cluster", "demo", "train", "fit", "predict", "evaluate", "report", "list-exits", "federated demo",
            "federated new")  # fmt: skip
POSITIONAL = ("cluster", "federated new")  # commands whose arguments without a default come without a name
SHORT = {"-k": "--n_clusters", "-o": "--out", "-q": "--quiet"}
QUIET = "--quiet"


def main(args: list[str] | None = None) -> None:
    """Entry point of `ssl-exit`: options may be written --n-clusters or --n_clusters.

    Wrong input ends with one line on stderr and status 2, an interrupt with status 130.
    """
    words = [_long(word) for word in (sys.argv[1:] if args is None else args)]
    if words[:1] == ["federated"]:
        words = [" ".join(words[:2]), *words[2:]]
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return
    if words[0] == "--version":
        print(f"ssl-exit {__version__}")
        return
    try:
        if words[0].startswith("--print_completion"):
            print(completion(words[0].partition("=")[2] or "".join(words[1:2])))
            return
        quiet, words = QUIET in words, [word for word in words if word != QUIET]
        function = command(words[0])
        parser = parser_of(words[0], function)
        _check_options(words[1:], parser)
        values = parser.parse_args(_lists(words[1:], parser) if words[0] not in POSITIONAL else words[1:]).as_dict()
        if quiet:
            os.environ["TQDM_DISABLE"] = "1"
        _own_the_process()
        if words[0] in BUILDING:
            sys.path.append("")
        from ssl_exit.cascade.memory import kept_memory

        silent = quiet and values.get("out") != "-"
        with kept_memory(), redirect_stdout(io.StringIO() if silent else _Printable(sys.stdout)):
            function(**_arguments(function, values))
    except (InputError, OSError, MemoryError) as error:
        print(f"ssl-exit: error: {printable(error, keep=NEWLINE) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "ssl-exit: interrupted; no output is half-written; cluster, predict and train --resume continue",
            file=sys.stderr,
        )
        sys.exit(130)


def command(name: str) -> Callable[..., None]:
    """The function behind a command.

    Raises:
        InputError: no command of that name.
    """
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}, or --help"
        raise InputError(f"no command {name!r}; {hint}")
    module = name.replace("-", "_").replace(" ", "_")
    return getattr(import_module(f"ssl_exit.cli.{module}"), module)


def parser_of(name: str, function: Callable[..., None]) -> Any:
    """A parser whose options are the function's arguments, with all options of those that are groups."""
    from jsonargparse import ArgumentParser

    groups = _groups(function)
    description = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    parser = ArgumentParser(prog=f"ssl-exit {name}", description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_function_arguments(function, skip=set(groups), as_group=False, as_positional=name in POSITIONAL)
    for group in groups.values():
        section = parser.add_argument_group(group.__name__, (group.__doc__ or "").partition("\n")[0])
        for option in options_of(group):
            text = option.help + (f" In {option.within}." if option.within else "")
            section.add_argument(f"--{option.flag}", type=option.type, default=option.default, help=text)
    return parser


def completion(shell: str) -> str:
    """A script that completes commands and options in a shell.

    Raises:
        InputError: another shell than bash, zsh or tcsh, or without shtab.
    """
    try:
        import shtab
    except ImportError as error:
        raise InputError("--print-completion needs shtab: pip install shtab") from error
    if shell not in shtab.SUPPORTED_SHELLS:
        raise InputError(f"--print-completion takes one of {', '.join(shtab.SUPPORTED_SHELLS)}; got {shell!r}")
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="ssl-exit")
    commands = parser.add_subcommands()
    for name in (name for name in COMMANDS if " " not in name):
        commands.add_subcommand(name, parser_of(name, command(name)))
    return shtab.complete(parser, shell)


def _check_options(words: list[str], parser: Any) -> None:
    """Refuse options that a command does not have, with the nearest that it has.

    Raises:
        InputError: there is one.
    """
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for word in words:
        name = word.partition("=")[0].partition(".")[0]
        if word.startswith("--") and name not in known and not name.startswith("--print_"):
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {_hyphened(near[0])}?" if near else "--help lists all"
            raise InputError(f"{parser.prog} has no option {_hyphened(name)}; {hint}")


def _lists(words: list[str], parser: Any) -> list[str]:
    """--mean 0.5 0.5 0.5 -> --mean [0.5, 0.5, 0.5], for all options that take a list."""
    hints = {o: str(getattr(action, "_typehint", "")) for action in parser._actions for o in action.option_strings}
    result: list[str] = []
    while words:
        name, *words = words
        n = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        few, hint = words[:n], hints.get(name, "")
        if few and few[0].startswith("["):
            few = [" ".join(few)]
        if few and "list[" in hint and not few[0].startswith("[") and (n > 1 or "str |" not in hint.split("list[")[0]):
            few = [f"[{', '.join(few)}]" if "list[float" in hint else json.dumps(few)]
        result += [name, *few]
        words = words[n:]
    return result


def _arguments(function: Callable[..., None], values: dict[str, Any]) -> dict[str, Any]:
    groups = _groups(function)
    own = {name: values[name] for name in inspect.signature(function).parameters if name not in groups}
    return own | {name: group.from_flat(values) for name, group in groups.items()}


def _groups(function: Callable[..., None]) -> dict[str, type[Group]]:
    hints = get_type_hints(function)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Group)}


def _overview() -> str:
    lines = [f"usage: ssl-exit COMMAND [options]\n\n{ABOUT}\n"]
    for name in COMMANDS:
        first = (inspect.getdoc(command(name)) or "").partition("\n")[0]
        lines.append(f"  {name:<16}{first}")
    last = "ssl-exit COMMAND --help lists the options of a command; -k stands for --n-clusters, -o for --out, -q for"
    more = "--quiet, which shows neither progress nor reports; --version and --print-completion SHELL stand alone."
    return "\n".join([*lines, "", last, more])


def _own_the_process() -> None:
    """What a program may do and a library may not: warnings as lines, and no limit of Pillow's beside `max_pixels`."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"ssl-exit: {printable(message, keep=NEWLINE)}\n"
    for notice in (DeprecationWarning, FutureWarning):  # of dependencies; nothing a user here can act on
        warnings.simplefilter("ignore", notice)
    warnings.filterwarnings("ignore", message=".* could not be used")  # commands list them one by one


class _Printable(io.TextIOBase):
    """A stream on which names in data cannot move the cursor or change colours."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable(text, keep=NEWLINE))

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()


def _hyphened(option: str) -> str:
    return "--" + option[2:].replace("_", "-")


def _long(word: str) -> str:
    """--n-clusters=5 -> --n_clusters=5; -k -> --n_clusters"""
    name, equals, value = SHORT.get(word, word).partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word
