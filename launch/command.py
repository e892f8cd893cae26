"""Shared by all commands: flags, settings, one line for every mistake, and exit codes."""

import contextlib
import ctypes
import difflib
import errno
import functools
import importlib.util
import os
import re
import runpy
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from absl import app, flags

from crossdict_jax.config import FREE, LATER, Config, settings, to_dict
from crossdict_jax.config.expectations import Expectation
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import (
    IN_THE_WAY,
    MEASURED,
    READ_ONLY,
    Workdir,
    alone,
    disk_words,
    flatten,
    open_workdir,
    read_json,
    understood,
    write_json,
)

Main = Callable[[Any, Workdir], None]
ROOT = Path(__file__).parents[1]
FILES = {  # flags that are not settings, and their help texts
    "config": "Python file with get_config(); default: configs/{}.py, or what made --workdir",
    "workdir": "Folder of the run; default: runs/{}, or runs/NAME of --config",
    "verbosity": "How much is said: 0 adds memory, -1 (default) stages and bars, -2 results alone",
    "expect": "A file of configs/ with published numbers to compare with at the end",
}
PATHS = {"config", "workdir", "expect"}  # in which no shell expands a ~ behind the =
SHORT = {"models": "models", "layers": "layers", "width": "sae.width", "seed": "seed"}
SHORT |= {"machine": "machine", "suite": "suite"}  # of launch.compile, launch.benchmark
EXAMPLES = {"get_config": "quickstart", "get_expectations": "chen2025_gpt2"}
GPU = ("jax_cuda13_plugin", "jax_cuda12_plugin")  # JAX's own for NVIDIA's
M_ARENA_MAX = -8  # heaps of threads; each keeps what it freed, and glibc would make 8 a core
HELP = {"help", "helpshort", "helpfull", "h", "?"}
ENVIRONMENT = {  # where nothing else is asked for
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # advice between the progress bars
    "TRANSFORMERS_VERBOSITY": "error",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "OPENBLAS_THREAD_TIMEOUT": "4",  # idle threads sleep: spinning, they slow those of XLA
}


def run(
    main: Main,
    *,
    kind: type = Config,
    default: str = "quickstart",
    table: str = "",
    writes: bool = True,
) -> None:
    """Runs ``main(config, work)`` as this process's command, and exits (see ``execute``).

    ``table`` is the function of ``crossdict_jax.report.terminal`` that prints the final table.
    """

    def start(config, work):
        _set_up_jax(work)
        if work:
            _choose(config, work)
        main(config, work)
        if table:
            with understood(work.root, mend="delete what was altered and run its stage again"):
                getattr(importlib.import_module("crossdict_jax.report.terminal"), table)(work)

    # Figures are drawn without a window, whatever else is asked for.
    os.environ.update(ENVIRONMENT | os.environ | {"MPLBACKEND": "svg"})
    sys.stdout.reconfigure(errors="replace")  # where a terminal lacks a character
    for number in (signal.SIGTERM, signal.SIGALRM):  # as Ctrl-C: see ``execute``, ``_again``
        signal.signal(number, signal.default_int_handler)
    sys.unraisablehook = _again
    with contextlib.suppress(AttributeError, OSError):  # glibc's alone
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, os.cpu_count())
    # absl's own parser exits with 1, and fails outside of main where nothing can be caught.
    flags.FLAGS.mark_as_parsed()
    act = functools.partial(execute, start, kind=kind, default=default, writes=writes)
    app.run(lambda argv: _leave(act(argv)), flags_parser=lambda argv: argv)


def _again(lost: Any, usual: Callable = sys.unraisablehook) -> None:
    """Repeats an interruption that came where Python drops exceptions, as in JAX's hook of gc."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # once this hook, which drops them too, is over
    else:
        usual(lost)


def _leave(code: int) -> int:
    """Ends an interrupted process at once: what JAX still computes could crash its usual end."""
    if code == 130:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    return code


def study(name: str) -> Main:
    """Returns the main of a study: ``run`` of its ``measure`` module, imported when it starts."""
    measure = f"crossdict_jax.studies.{name}.measure"
    return lambda config, work: importlib.import_module(measure).run(config, work)


def execute(
    main: Main,
    argv: Sequence[str],
    *,
    kind: type = Config,
    default: str = "quickstart",
    writes: bool = True,
) -> int:
    """Runs the command ``argv`` (program name and arguments) and returns the exit code.

    0: done. 1: a number of --expect was missed. 2: a mistake of the user, or the disk or the memory
    is full; one line on stderr says how to mend it. 130: interrupted, by Ctrl-C or SIGTERM. 141:
    nobody reads the output any more. Any other exception passes through: it is a bug.

    Args:
      kind: the class of settings of the verb.
      default: its file in configs/ without ``--config``.
      writes: whether it has a work directory; without one ``main`` gets None.
    """
    try:
        if HELP & {arg.lstrip("-") for arg in argv[1:] if arg.startswith("-")}:
            lines = (sys.modules["__main__"].__doc__ or "", *usage(kind, default))
            print("\n".join(lines), flush=True)
            return 0
        config, workdir, expected = parse(argv, kind=kind, default=default)
        check(config)
        if expected and not writes:
            raise UserError("--expect means nothing to this command; leave it out.")
        with alone(Path(workdir)) if writes else contextlib.nullcontext():
            work, usual = None, to_dict(type(config)())
            if writes:
                work = open_workdir(workdir, to_dict(config), usual=usual, free=FREE, later=LATER)
            main(config, work)
            sys.stdout.flush()
            return 1 if expected and missed(expected, work) else 0
    except UserError as error:
        code, message = 2, str(error)
    except BrokenPipeError:  # who read the output has seen enough, as in | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as of a process that the signal ended
    except KeyboardInterrupt:
        code = 130
        message = "Interrupted; the same command again goes on from what is finished."
    except Exception as error:
        code, message = 2, _machine_words(error)
        if not message:
            raise
    print(" ".join(message.splitlines()), file=sys.stderr, flush=True)
    return code


def missed(expectations: Sequence[Expectation], work: Workdir) -> int:
    """Prints every number as published and as obtained; returns how many are missed."""
    from crossdict_jax.report.tables import show, table

    rows = []
    for expected in expectations:
        with understood(work.results):
            value = expected.obtained(work)
        near = value is not None and expected.low <= value <= expected.high
        allowed = f"{expected.low:g} to {expected.high:g}"
        cells = {"what": expected.words, "published": expected.published, "allowed": allowed}
        shown = "undefined" if value is None else f"{value:.4g}"
        cells |= {"obtained": shown, "": "met" if near else "MISSED"}
        rows.append(cells | {"source": expected.source})
    show([table("Expected", rows)])
    return sum(row[""] == "MISSED" for row in rows)


def check(config: Any) -> None:
    """Raises UserError for a wrong setting; names the models of a config that names none."""
    settings.validate(config)
    try:
        importlib.import_module("jax")
    except ValueError as error:
        raise UserError(f"JAX does not start ({error}); correct or unset that variable.") from error
    if isinstance(config, Config):
        from crossdict_jax.dictionaries.base import check_settings
        from crossdict_jax.models import EMBEDDED

        check_settings(config)
        config.models = config.models or EMBEDDED


def _machine_words(error: BaseException | None) -> str:
    """Advice for a full disk or memory, whichever library met it; else nothing."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    disk = [*map(os.strerror, full), r"\d+ requested and \d+ written"]  # the last by numpy
    first = error
    while error is not None:
        number, text = getattr(error, "errno", None), str(error)
        if number in full or re.search("|".join(disk), text):
            return f"No space left on the disk ({first}); free some and run the same command again."
        if isinstance(error, OSError) and number in READ_ONLY + IN_THE_WAY:
            return disk_words(error.filename or "A file", error, cannot="cannot be read or written")
        if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", text):
            return (
                f"Out of memory ({text.splitlines()[0][:200] if text else 'on the host'}); lower a "
                "batch_size (extract, sae, map, evaluation, intervention), sae.width or the number "
                "of layers, and run again: what is finished is kept."
            )
        error = error.__cause__ or error.__context__
    return ""


def _choose(config: Any, work: Workdir) -> None:
    """Writes down what "auto" settings mean on this machine; a run goes on with its first choice.

    What depends on more than the machine, such as ``sae.products``, checkpoints keep.
    """
    from crossdict_jax.training.mesh import product_dtype

    written, decided = work.root / "config.json", False
    first = dict(flatten(read_json(written)))
    for name, usual in flatten(to_dict(type(config)())):
        if usual == settings.get(config, name) == "auto":
            value = first.get(name, "auto")
            if value == "auto" and name.endswith("matmul_dtype"):
                value, decided = product_dtype(value).name, True
            settings.put(config, name, value)
    settings.validate(config)
    if decided:
        write_json(written, to_dict(config))


def _set_up_jax(work: Workdir | None = None) -> None:
    """Keeps compiled programs for the next run, and numbers the same whatever is set.

    The compiler of NVIDIA's GPUs measures which kernels are fast, and others round otherwise: what
    it measured lies in the work directory, so that a run that moves ends with the same bits.
    """
    import jax

    from crossdict_jax.modules import SWITCHES

    # XLA ends at a flag that a later version lost.
    known = jax.__version_info__ < (0, 13) and any(map(importlib.util.find_spec, GPU))
    if work and known and os.access(work.root, os.W_OK):
        measured = work.root.absolute() / MEASURED
        measured.mkdir(exist_ok=True)
        quoted = re.sub(r'(["\\])', r"\\\1", str(measured))
        asked = f'--xla_gpu_per_fusion_autotune_cache_dir="{quoted}"'
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {asked}".strip()
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # another folder
    for name, value in (SWITCHES | {"random_seed_offset": 0}).items():
        jax.config.update(f"jax_{name}", value)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        told = (str(error).splitlines() or ["it is not installed"])[0]
        names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES")
        names = [name for name in names if os.environ.get(name)]
        asked = " ".join(f"{name}={os.environ[name]}" for name in names) or "JAX_PLATFORMS="
        raise UserError(
            f"JAX finds no device for {asked} ({told}); unset it, or set JAX_PLATFORMS=cpu alone."
        ) from error
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # JAX_COMPILATION_CACHE_DIR goes before; who has no home has no cache.
    if not jax.config.jax_compilation_cache_dir and Path(base).is_absolute():
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "crossdict_jax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # A cache that cannot be used costs time only.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")


class _Setting(flags.ArgumentParser):
    def __init__(self, kind: Any):
        self.parse = functools.partial(settings.parse, kind)


def parse(
    argv: Sequence[str], *, kind: type = Config, default: str = "quickstart"
) -> tuple[Any, str, Sequence[Expectation]]:
    """Returns (the config, the path of the work directory, the expectations of ``--expect``).

    Raises:
      UserError: a flag, a setting, a value or the config file is not understood.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()  # flags in whatever order
    names = settings.settings(kind)
    types = {f"config.{name}": field.type for name, field in names.items()}
    types |= {flag: names[name].type if name in names else str for flag, name in SHORT.items()}
    types |= dict.fromkeys(FILES, str) | {"verbosity": int}
    for flag, type_ in types.items():
        flags.DEFINE(_Setting(type_), flag, None, "", flag_values=values)
    for arg in argv[1:]:  # absl would seek the likes of a long name for minutes
        dashes, flag = re.match("(-*)([^=]*)", arg).groups()
        if dashes and len(flag) > 99:
            raise UserError(_unknown_flag(kind, flag[:99]))
    try:
        positional = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(kind, error.flagname)) from error
    except (flags.Error, UnicodeDecodeError) as error:  # the second of a --flagfile
        raise UserError(f"{str(error).removeprefix('flag ').rstrip('.')}; see --help.") from error
    if positional:
        raise UserError(
            f"{positional[0]!r} is not a flag; give --name=value, lists without spaces, as in "
            "--layers=5,6,7."
        )
    asked = {flag: values[flag].value for flag in values if values[flag].value is not None}
    asked |= {flag: os.path.expanduser(asked[flag]) for flag in PATHS & asked.keys()}
    expected = _load(asked["expect"], "get_expectations") if "expect" in asked else ()
    # Warnings and worse by default: some libraries narrate every file.
    flags.FLAGS["verbosity"].value = asked.get("verbosity", -1)
    workdir, file = asked.get("workdir"), f"{default}.py"
    if workdir is not None:
        if not workdir.strip():
            raise UserError("--workdir= is empty; name a folder, or leave it out.")
        if Workdir(Path(workdir)).computed and (Path(workdir) / "config.json").exists():
            file = f"stored.py:{workdir}"
    path = asked.get("config", f"{ROOT}/configs/{file}")
    config = _load(path)
    if not isinstance(config, kind):
        told = f"--config={path} gives", "file of configs/"
        if "config" not in asked:
            told = f"--workdir={workdir} belongs to another command: it has", "--workdir"
        raise UserError(
            f"{told[0]} {type(config).__name__} settings, where this command needs "
            f"{kind.__name__}; name another {told[1]}."
        )
    settings.check_groups(config, kind)
    for flag, value in asked.items():
        name = SHORT.get(flag) or flag.removeprefix("config.")
        long = asked.get(f"config.{name}", value)
        if flag in SHORT and name not in names:
            raise UserError(f"--{flag}={value} means nothing to this command; leave it out.")
        if long is not value and long != value:  # NaN is not itself
            raise UserError(
                f"--{flag}={settings.spell(value)} and --config.{name}={settings.spell(long)} "
                "contradict each other; give one of them."
            )
        if flag not in FILES:
            settings.put(config, name, value)
    for name in ("control_kinds", "intervention.maps", "contrast.maps", "probe.maps"):
        for kind in asked.get(f"config.{name}", ()):  # files name more than a narrowed run fits
            settings.validate(config)
            if kind not in ("all", *config.map.kinds):
                raise UserError(
                    f"{name}={kind} is not fitted; use some of "
                    f"map.kinds={settings.spell(config.map.kinds)}, or add it there."
                )
    return config, workdir or f"runs/{Path(path.partition(':')[0]).stem}", expected


def _unknown_flag(kind: type, flag: str) -> str:
    if flag.startswith("config."):
        settings.check_name(kind, flag.removeprefix("config."))
    flags_ = [*FILES, *SHORT]
    close = difflib.get_close_matches(flag, flags_, n=1)
    meant = f", did you mean --{close[0]}?" if close else "."
    return (
        f"There is no flag --{flag}{meant} There are {', '.join(f'--{f}' for f in flags_)} and "
        "--config.NAME; see --help."
    )


def _load(path: str, function: str = "get_config") -> Any:
    """Returns a config file's ``function()``; ``path`` is FILE or FILE:ARGUMENT."""
    name, _, argument = path.partition(":")
    file = Path(name) if Path(name).is_file() else ROOT / name  # configs/ is there in any folder
    if not file.is_file():
        files = ", ".join(sorted(file.stem for file in (ROOT / "configs").glob("[!_]*.py")))
        raise UserError(f"{path}: there is no file {name!r}; configs/NAME.py exists for {files}.")
    sys.path.append(str(file.parent))  # it may import another beside it
    try:
        return runpy.run_path(str(file))[function](*([argument] if argument else []))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's own file does
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {f.lineno}" for f in frames if f.filename == str(file)]
        raise UserError(
            f"{path} has no usable {function}() ({type(error).__name__}: {error}"
            f"{lines[-1] if lines else ''}); see configs/{EXAMPLES[function]}.py."
        ) from error


def usage(kind: type, default: str) -> Iterator[str]:
    """Yields the lines of ``--help``: every flag, and every setting with its default by groups."""
    yield ""
    names = settings.settings(kind)
    short = {flag: names[name].metadata["help"] for flag, name in SHORT.items() if name in names}
    for flag, text in (FILES | short).items():
        yield f"  {f'--{flag}':<11} {text.format(default)}"
    groups = [("--config.", _load(f"{ROOT}/configs/{default}.py"))]
    for prefix, group in groups:
        yield f"\n{type(group).__doc__ or type(group).__name__}"  # python -OO has no docstrings
        for field in fields(group):
            value = getattr(group, field.name)
            if is_dataclass(value):
                groups.append((f"{prefix}{field.name}.", value))
                continue
            rule = field.metadata["rule"]
            choices = f" ({rule.words})" if rule and rule.words.startswith("one of") else ""
            flag = f"{prefix}{field.name}={settings.spell(value)}"
            yield f"  {flag:<45} {field.metadata['help']}{choices}"
