"""What every command shares: flags, settings, one line for every mistake, and exit codes."""

from __future__ import annotations

import difflib
import errno
import functools
import inspect
import os
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from crossdict_jax.config import FREE, Config, settings, to_dict
from crossdict_jax.config.expectations import Expectation, compare
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import Workdir, open_workdir

Main = Callable[[Any, Workdir], None]
ROOT = Path(__file__).parents[1]
SHORT = {  # flag: (the setting that it stands for, what it is)
    "models": ("models", "two or more directories or hub ids; without it the embedded pair"),
    "layers": ("layers", "one list for all models, as in 5,6,7"),
    "width": ("sae.width", "features of each dictionary, as in 4096"),
    "seed": ("seed", "of everything random, as in 0"),
}
EXAMPLES = {"get_config": "quickstart", "get_expectations": "chen2025_gpt2"}
HELP = {"help", "helpshort", "helpfull", "h", "?"}
QUIET = {  # advice that nobody asked for, between the progress bars
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


@dataclass(frozen=True)
class Command:
    """A verb: what it does, its class of settings, and its file in configs/ by default."""

    main: Main  # (config, work) -> None
    kind: type = Config
    default: str = "quickstart"

    @property
    def about(self) -> str:
        return inspect.getdoc(sys.modules[self.main.__module__])


def run(main: Main, **how: Any) -> None:
    """Runs ``main(config, work)`` as this process's command, and exits (see ``execute``).

    Args:
      how: ``kind`` and ``default`` of the Command.
    """

    @functools.wraps(main)
    def start(config, work):
        from crossdict_jax.report.records import following

        _set_up_jax()
        with following(work, getattr(config, "records", ())):
            main(config, work)

    def act(argv):
        flags.FLAGS.verbosity = -1  # warnings and worse: some libraries narrate every file
        return execute(Command(start, **how), argv, values=flags.FLAGS)

    os.environ.update(QUIET | os.environ)
    app.run(act, flags_parser=_leave_to_execute)


def _leave_to_execute(argv: list[str]) -> list[str]:
    # absl's own parser exits with 1, and fails outside of main where nothing can be caught.
    flags.FLAGS.mark_as_parsed()
    return argv


def execute(command: Command, argv: list[str], *, values: flags.FlagValues) -> int:
    """Does what ``argv`` asks for and returns the exit code.

    0: done. 1: a number of --expect was missed. 2: the user got something wrong; one line on
    stderr says what and how to mend it. 130: interrupted. Any other exception passes through: it
    is a bug.

    Args:
      argv: the program's name and its arguments.
      values: flags are defined here.
    """
    try:
        if HELP & {arg.lstrip("-") for arg in argv[1:] if arg.startswith("-")}:
            print(usage(command))
            return 0
        expected, argv = _expected(argv)
        config, workdir = parse(command, argv, values=values)
        work = _prepare(config, workdir)
        command.main(config, work)
        return 1 if expected and compare(expected, work) else 0
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _complain("Interrupted; the same command again goes on from what is finished.")
        return 130
    except Exception as error:
        if not _is_full_disk(error):
            raise
        return _complain(
            f"No space left on the disk ({error}); free some and run the same command again."
        )


def _complain(message: str) -> int:
    print(" ".join(message.splitlines()), file=sys.stderr, flush=True)
    return 2


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an error comes from a disk that takes no more, whichever library met it."""
    reasons = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = [*map(os.strerror, reasons), r"\d+ requested and \d+ written"]  # the last by numpy
    while error is not None:
        if getattr(error, "errno", None) in reasons or re.search("|".join(words), str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _prepare(config: Any, workdir: str) -> Workdir:
    """Returns the work directory of a config, checked and with its models named."""
    settings.validate(config)
    if isinstance(config, Config) and not config.models:
        from crossdict_jax.models import EMBEDDED

        config.models = EMBEDDED
    usual = to_dict(type(config)())
    return open_workdir(workdir, to_dict(config), usual=usual, free=FREE)


def _set_up_jax() -> None:
    """Keeps compiled programs for the next run, and float32 exact where TF32 is the default.

    Speed is a choice of the ``matmul_dtype`` settings alone.
    """
    import jax

    from crossdict_jax.activations.docstrings import cache_folder

    if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR goes before
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # A cache that cannot be used costs time only.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
    jax.config.update("jax_default_matmul_precision", "highest")


# ---------------------------------------------------------------- the command line


class _ConfigFile(flags.ArgumentParser):
    """Reads FILE or FILE:ARGUMENT of ``--config``; ml_collections' own hides what went wrong."""

    def __init__(self, kind: type):
        self._kind = kind

    def parse(self, path: str) -> Any:
        config = _load(path)
        if not isinstance(config, self._kind):
            raise UserError(
                f"--config={path} gives {type(config).__name__} settings, where this command needs "
                f"{self._kind.__name__}; name another file of configs/."
            )
        return config


def _expected(argv: list[str]) -> tuple[list[Expectation], list[str]]:
    """Returns (what the file of ``--expect`` expects, the rest of ``argv``)."""
    own = flags.FlagValues()
    flags.DEFINE_string("expect", None, "", flag_values=own)
    own.set_gnu_getopt()
    try:
        rest = own(argv, known_only=True)
    except flags.Error as error:
        raise UserError(f"{str(error).rstrip('.')}; see --help.") from error
    path = own["expect"].value
    return ([] if path is None else list(_load(path, "get_expectations"))), rest


def _load(path: str, function: str = "get_config") -> Any:
    """Returns what a function of a config file gives; ``path`` is FILE or FILE:ARGUMENT."""
    name, _, argument = path.partition(":")
    if not Path(name).is_file():
        known = ", ".join(sorted(file.stem for file in (ROOT / "configs").glob("[!_]*.py")))
        raise UserError(f"{path}: there is no file {name!r}; configs/NAME.py exists for {known}.")
    try:
        return runpy.run_path(name)[function](*([argument] if argument else []))
    except UserError:
        raise
    except Exception as error:  # whatever the user's own file does
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        raise UserError(
            f"{path} has no usable {function}() ({type(error).__name__}: {error}, "
            f"line {line}); see configs/{EXAMPLES[function]}.py."
        ) from error


class _Setting(flags.ArgumentParser):
    """Reads a setting of one type; its default comes as a value already."""

    def __init__(self, kind: Any):
        self._kind = kind

    def parse(self, argument: Any) -> Any:
        return settings.parse(self._kind, argument) if isinstance(argument, str) else argument


for _kind in settings.TYPES:
    config_flags.register_flag_parser_for_type(_kind, _Setting(_kind))


def parse(command: Command, argv: list[str], *, values: flags.FlagValues) -> tuple[Any, str]:
    """Returns (the config, the path of the work directory) that a command line asks for.

    Raises:
      UserError: a flag, a setting, a value or the config file is not understood.
    """
    try:
        own, rest = _own_flags(argv)
        path, workdir = own["config"].value, own["workdir"].value
        if path is None:
            path = _usual_config(command, workdir)
        config = _read_settings(command, [rest[0], f"--config={path}", *rest[1:]], values)
        for flag in SHORT:
            _apply_short(flag, own[flag].value, config, values)
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error.flagname)) from error
    except flags.Error as error:
        raise UserError(f"{str(error).removeprefix('flag ').rstrip('.')}; see --help.") from error
    if workdir is None:
        workdir = f"runs/{Path(path.partition(':')[0]).stem}"
    return config, workdir


def _unknown_flag(name: str) -> str:
    known = ["config", "workdir", "expect", *SHORT]
    close = difflib.get_close_matches(name, known, n=1)
    meant = f", did you mean --{close[0]}?" if close else "."
    return (
        f"There is no flag --{name}{meant} There are {', '.join(f'--{k}' for k in known)} and "
        "--config.NAME; see --help."
    )


def _own_flags(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """Returns (the flags that are not settings, the rest of ``argv``), in whatever order."""
    own = flags.FlagValues()
    for name in ("config", "workdir", *SHORT):
        flags.DEFINE_string(name, None, "", flag_values=own)
    own.set_gnu_getopt()
    return own, own(argv, known_only=True)


def _usual_config(command: Command, workdir: str | None) -> str:
    """Returns the config file used without ``--config``: the work directory's, or the default."""
    if workdir is not None and (Path(workdir) / "config.json").exists():
        return f"{ROOT}/configs/stored.py:{workdir}"
    return f"{ROOT}/configs/{command.default}.py"


def _read_settings(command: Command, argv: list[str], values: flags.FlagValues) -> Any:
    """Returns the config with its ``--config.NAME=VALUE`` overrides."""
    for arg in argv[1:]:
        override = re.match(r"--?(?:no)?config\.([^=]*)", arg)
        if override:
            settings.check_name(command.kind, override[1])
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values["config"].parser = _ConfigFile(command.kind)
    positional = values(argv)[1:]
    if positional:
        raise UserError(
            f"{positional[0]!r} is not a flag; give --name=value, lists without spaces, as in "
            "--layers=5,6,7."
        )
    return values["config"].value


def _apply_short(flag: str, text: str | None, config: Any, values: flags.FlagValues) -> None:
    """Sets what a short flag stands for; refuses two spellings that say different things."""
    name, _ = SHORT[flag]
    if text is None:
        return
    if name not in settings.settings(type(config)):
        raise UserError(f"--{flag}={text} means nothing to this command; leave it out.")
    try:
        value = settings.parse(settings.settings(type(config))[name], text)
    except ValueError as error:
        raise UserError(f"--{flag}={text}: {error}.") from error
    long = config_flags.get_override_values(values["config"]).get(name, value)
    if long != value:
        raise UserError(
            f"--{flag}={text} and --config.{name}={settings.spell(long)} contradict each other; "
            "give one of them."
        )
    settings.put(config, name, value)


# ---------------------------------------------------------------- --help


def usage(command: Command) -> str:
    """Returns the text of ``--help``: the verb, its flags, and every setting with its default."""
    known = settings.settings(command.kind)
    short = [(f"--{flag}", what) for flag, (name, what) in SHORT.items() if name in known]
    rows = [
        ("--config", f"python file with get_config(); default configs/{command.default}.py, or"),
        ("", "the settings of --workdir if that exists"),
        ("--workdir", f"folder of the run; default runs/{command.default} (runs/NAME of --config)"),
        ("--expect", "a file of configs/ with published numbers to compare with at the end"),
        *short,
        ("", ""),
        *_describe(command.kind(), "--config."),
    ]
    return f"{command.about}\n\n" + "\n".join(f"  {left:<40} {right}" for left, right in rows)


def _describe(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields (flag=default, the comment beside the field in the source) of every setting."""
    source = inspect.getsource(type(config))
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", source, re.MULTILINE))
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from _describe(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}={settings.spell(value)}", comments.get(f.name, "")
