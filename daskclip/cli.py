"""The command line: strings in, a call of the engine, text or JSON out."""

import io
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import click

try:
    import dask

    from daskclip.engine import clip_zarr, plan_zarr, stats_zarr, verify_zarr
    from daskclip.engine import discard as discard_run
    from daskclip.engine import status as status_of
except Exception as error:  # Dask and zarr read their settings when they are imported
    # what comes after the first error says less: zarr is left half imported
    why = " ".join(str(getattr(sys.modules["daskclip"], "_error", error)).split())
    click.echo(f"daskclip: a package cannot be imported ({why}); check its settings", err=True)
    sys.exit(getattr(error, "exit_code", 3))

from daskclip.arguments import axes_from_text, dim_from_text
from daskclip.errors import DaskClipError, InvalidValueError, error_text, short_repr
from daskclip.report import as_document, as_page, as_text, output

# \b keeps the lines: click would fill them
EXIT_CODES = """\b
Exit codes: 0 done or up to date, 1 storage failure or bug (run again to resume),
2 usage error, 3 a parameter or the source rejected, 4 verification failed,
5 the target exists, is being written or has an unfinished run with other
parameters, 75 interrupted or temporarily failed: run again."""
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h
EXTRA = {
    "--axes": "axes and dimensions are one word, as in --axes 0,1; repeat --include and --exclude",
    "--source": "give the source as --source SOURCE",
}
"""Remedies for an argument too many, by an option that the command has."""
OWN = ("scheduler", "workers", "report", "html", "as_json")
"""Options that are not passed on to the engine."""
CONFIGURED = ("memory", "nonfinite", "missing", "progress")
"""Options with a default in Dask's configuration."""


Groups = dict[str, list[click.Option]]
"""Options by the heading that ``--help`` lists them under."""


class _Command(click.Command):
    """Command whose options are listed in groups."""

    def __init__(
        self, name: str | None, *, params: list[click.Parameter], groups: Groups, **extra: Any
    ) -> None:
        params = [*params, *chain.from_iterable(groups.values())]
        super().__init__(name, params=params, epilog=EXIT_CODES, **extra)
        self.groups = groups

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            # before click proposes an option that is only spelled alike
            name, commands = error.option_name, main.commands.values()
            having = [str(c.name) for c in commands if any(name in p.opts for p in c.params)]
            if not having:
                raise
            text = f"{self.name} has no option {name}, which is one of {', '.join(having)}"
            raise click.UsageError(text) from None
        except click.UsageError as error:
            if "extra argument" in error.message:
                taken = " ".join(self.collect_usage_pieces(ctx)[1:])
                hints = (EXTRA[o] for p in self.params for o in p.opts if o in EXTRA)
                text = "; ".join([error.message, f"{self.name} takes {taken}", *hints])
                raise click.UsageError(text) from None
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        help_option = self.get_help_option(ctx)  # the only one that click adds
        rest = {"Other options": [help_option] if help_option else []}
        for heading, options in (self.groups | rest).items():
            records = (option.get_help_record(ctx) for option in options)
            with formatter.section(heading):
                formatter.write_dl([record for record in records if record])


def _option(names: str, metavar: str | None, text: str, **extra: Any) -> click.Option:
    return click.Option(names.split(), metavar=metavar, help=text, show_default=True, **extra)


def _clip_norm(text: str) -> Any:
    # the engine checks quantiles: only arguments that look like numbers are usage errors
    if text.startswith("p"):
        return text
    try:
        return float(text)
    except ValueError:
        wrong = f"{text!r} is neither a number nor a percentile; write it as 1.5 or p99"
        raise click.BadParameter(wrong) from None


def _flag(names: str, text: str) -> click.Option:
    return _option(names, None, text, is_flag=True)


def _choice(name: str, default: str, choices: str, text: str) -> click.Option:
    return _option(name, None, text, type=click.Choice(choices.split()), default=default)


FILE = click.Path(dir_okay=False, path_type=Path)
SOURCE, TARGET = click.Argument(["source"]), click.Argument(["target"])
SPREAD = "Spread NaN and infinity to their slice, omit NaN, stop, or make the slice zeros."
MISSING = "Read chunks that are not stored as the fill value, or stop."
QUANTILE = "Limit, as 1.5; p99 is the 99th percentile of the norms."
INCLUDE = "Clip only these arrays of a group: 'layers/*'."
PROGRESS = "Show progress on stderr; auto is a bar on a terminal, else lines."
CLIP = [
    _option("--axes", "AXES", "Axes to reduce, e.g. 0,2 or 1:; all by default, '' for none."),
    _option("--dim", "NAMES", "Dimensions to reduce, e.g. time,lat (instead of --axes)."),
    _choice("--ord", "2", "1 2 inf", "Order of the norm."),
    _option("--include", "PATTERN", INCLUDE, multiple=True),
    _option("--exclude", "PATTERN", "Copy these arrays of a group as they are.", multiple=True),
    _flag("--global global_norm", "Take one norm over all arrays, or one for each kept position."),
    _choice("--nonfinite", "propagate", "propagate omit raise zero", SPREAD),
    _choice("--missing", "fill", "fill error", MISSING),
]
LIMIT = [
    _option("--clip-norm", "C|pQ", QUANTILE, type=_clip_norm),
    _option("--limits", "PATH", "Array or group of a limit for each slice (not with --clip-norm)."),
    _flag("--normalize", "Scale every slice to its limit, from below too."),
    _option("--norms", "PATH", "Reuse norms saved by `stats --save-norms`."),
]
RESOURCES = [
    _option("--memory", "SIZE", "Memory budget per worker process.", default="512MiB"),
    _option("--scheduler", "ADDRESS", "Use the Dask cluster at this address or scheduler file."),
    _option("--workers", "N", "Start N local worker processes.", type=click.IntRange(min=1)),
]
DESTINATION = [
    _flag("--in-place", "Replace SOURCE; give no TARGET."),
    _flag("--overwrite", "Replace an array or group at TARGET."),
    _flag("--dry-run", "Show the plan and write nothing."),
]
REPORT = [
    _flag("--json as_json", "Print the report as JSON."),
    _option("--report", None, "Write the report to FILE as JSON.", type=FILE),
    _option("--html", None, "Write the report to FILE as HTML with charts.", type=FILE),
    _choice("--progress", "auto", "auto bar lines json none", PROGRESS),
]
SAVE_NORMS = _option("--save-norms", "PATH", "Save the norms for `run --norms`.")
VERIFY = [
    _option("--source", "PATH", "Clip every block of the source again and compare."),
    _option("--limits", "PATH", "Limits used by the original run."),
]
CLIPPING: dict[str, Any] = {
    "cls": _Command,
    "params": [SOURCE, click.Argument(["target"], required=False)],
    "groups": {
        "What to clip": CLIP,
        "Which limit": LIMIT,
        "Resources": RESOURCES,
        "Output": [*DESTINATION, *REPORT],
    },
}


class _Group(click.Group):
    """Group of commands that reports every error on one line."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _reporting_errors():
            # options of the command line take precedence over these
            extra["default_map"] = dict.fromkeys(("run", "plan", "stats"), _defaults())
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _reporting_errors():
            return super().invoke(ctx)


def _defaults() -> dict[str, str]:
    """Defaults of options from Dask's configuration: its files and the environment."""
    defaults = dask.config.get("daskclip", None) or {}
    where, known = "dask's configuration has daskclip", ", ".join(CONFIGURED)
    if not isinstance(defaults, dict):
        wrong = f"{where} {short_repr(defaults)}, which has no names; give it {known}"
        raise InvalidValueError(wrong)
    texts = {}
    for name, value in defaults.items():
        if name not in CONFIGURED:
            raise InvalidValueError(f"{where}.{name}, which is unknown; use one of {known}")
        # Dask reads the word none as None
        texts[name] = "none" if value is None else str(value)
        (option,) = (o for o in (*CLIP, *RESOURCES, *REPORT) if o.name == name)
        if isinstance(option.type, click.Choice) and texts[name] not in option.type.choices:
            remedy = f"use one of {', '.join(option.type.choices)}"
            raise InvalidValueError(f"{where}.{name} {short_repr(value)}; {remedy}")
    return texts


@contextmanager
def _reporting_errors() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    output.open_standard_files()
    # a scheduler that preempts a job sends SIGTERM first: end it like Ctrl-C
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except click.UsageError as error:
        text = " ".join(error.format_message().split())
        _exit(f"{text[:1].lower()}{text[1:].rstrip('.')}; see --help", error.exit_code)
    except DaskClipError as error:
        _exit(str(error), error.exit_code)
    except OSError as error:  # also of --help, which click prints
        _exit(f"{error_text(error)}; mend the cause and run the same command again", 1)
    except KeyboardInterrupt:
        # not 130, the usual code of Ctrl-C: a queue that knows 75 submits the command again
        _exit("interrupted; run the same command again to resume", INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)
        output.drop_unwritten()


def _exit(message: str, code: int) -> NoReturn:
    with suppress(OSError):  # of stderr: the exit code is still right
        click.echo(f"daskclip: {message}", err=True)
    sys.exit(code)


@click.group(
    "clip",
    cls=_Group,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)
@click.version_option(package_name="daskclip", prog_name="daskclip")
def main() -> None:
    """Clip norms of Zarr arrays larger than memory, exactly."""
    # zarr warns of codecs and dtypes outside its specification; stderr has one line an event
    warnings.simplefilter("ignore")
    # a name in a report may be no UTF-8, or nothing that the terminal can show
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@main.command(**CLIPPING)
def run(dry_run: bool, **options: Any) -> None:
    """Clip an array or group SOURCE into a new TARGET.

    An interrupted run is resumed by the same command.
    """
    _call(plan_zarr if dry_run else clip_zarr, **options)


@main.command(**CLIPPING)
def plan(dry_run: bool, **options: Any) -> None:
    """Show the plan for `run` with the same options; read no chunk."""
    # --dry-run is accepted and ignored, so that any command line of run is one of plan
    _call(plan_zarr, **options)


@main.command(
    cls=_Command,
    params=[SOURCE],
    groups={"What to measure": CLIP, "Resources": RESOURCES, "Output": [SAVE_NORMS, *REPORT]},
)
def stats(**options: Any) -> None:
    """Show the norms of SOURCE and what a limit would clip."""
    _call(stats_zarr, **options)


@main.command(cls=_Command, params=[TARGET], groups={"What to compare": VERIFY})
def verify(target: str, source: str | None, limits: str | None) -> None:
    """Check the files and norms of a TARGET that `run` wrote.

    With --source, every bit is compared too.
    """
    output.print_text(as_text(verify_zarr(target, source, limits=limits)))


@main.command(cls=_Command, params=[TARGET], groups={})
def status(target: str) -> None:
    """Show whether TARGET exists and whether a run is unfinished."""
    output.print_text(
        "\n".join(f"{name:<10}  {value}" for name, value in status_of(target).items())
    )


@main.command(cls=_Command, params=[TARGET], groups={})
def discard(target: str) -> None:
    """Remove an unfinished run; TARGET stays as it is."""
    output.print_text("discarded" if discard_run(target) else "there is no unfinished run")


def _call(function: Callable[..., Any], **options: Any) -> None:
    """Call the engine with the options that are its own, and print what it returns."""
    scheduler, workers, report, html, as_json = map(options.pop, OWN)
    if function is not stats_zarr and options["clip_norm"] is options["limits"] is None:
        raise click.UsageError("Missing option '--clip-norm' or '--limits'.")
    with _cluster(scheduler, workers, options["progress"]):
        # checked now: after a run of hours the report would be lost
        for path in (report, html):
            if path is not None and not (folder := path.absolute().parent).is_dir():
                raise InvalidValueError(f"folder {folder} of the report does not exist; create it")
        if html is not None and function is not stats_zarr:
            options["pictures"] = True
        options["axes"] = axes_from_text(options["axes"])
        options["dim"] = dim_from_text(options["dim"])
        result = function(**options | {"ord": float(options["ord"])})
        with ExitStack() as outputs:  # each is written, even if another one cannot be
            outputs.callback(output.print_text, as_document(result) if as_json else as_text(result))
            if html is not None:
                outputs.callback(output.write_text, html, as_page(result))
            if report is not None:
                outputs.callback(output.write_text, report, as_document(result) + "\n")


@contextmanager
def _cluster(scheduler: str | None, workers: int | None, progress: str) -> Iterator[None]:
    """Connect to a Dask cluster or start one, if an option says so."""
    if scheduler is not None and workers is not None:
        raise click.UsageError("--scheduler and --workers exclude each other")
    if scheduler is None and workers is None:
        yield
        return
    try:
        # only here: distributed takes a second to import
        from distributed import Client
    except Exception as error:  # of its part of Dask's configuration
        raise _no_cluster("distributed cannot be imported", error) from error
    # a lost cluster is reported on one line here, and not by the loggers of distributed too
    noisy = [n for n in logging.root.manager.loggerDict if n.startswith("distributed")]
    for name in (*noisy, "asyncio", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    with ExitStack() as stack:
        if workers is not None:
            try:
                client = stack.enter_context(Client(stack.enter_context(_start_workers(workers))))
            except Exception as error:  # settings of distributed make it raise anything
                raise _no_cluster(f"{workers} local workers cannot be started", error) from error
        else:
            client = stack.enter_context(_connect(str(scheduler)))
        link = client.dashboard_link
        if link and progress != "none":
            line = json.dumps({"dashboard": link})
            with suppress(OSError):
                click.echo(
                    line if progress == "json" else f"daskclip: dashboard at {link}", err=True
                )
        yield


def _connect(scheduler: str) -> Any:
    from distributed import Client

    where = {"scheduler_file" if os.path.isfile(scheduler) else "address": scheduler}
    try:
        return Client(**where, timeout=10)
    except Exception as error:  # protocols, security and files each raise errors of their own
        with suppress(ValueError):  # there is none if it has closed itself
            Client.current().close()  # else it remains the default one
        named = " ".join(scheduler.split()) or "''"
        raise InvalidValueError(
            f"no Dask scheduler answers at {named} ({error_text(error)}); check the address, or "
            "what the scheduler file holds"
        ) from error


def _no_cluster(what: str, error: Exception) -> InvalidValueError:
    return InvalidValueError(f"{what} ({error_text(error)}); check Dask's configuration")


def _start_workers(workers: int) -> Any:
    from distributed import LocalCluster

    # a terminal sends Ctrl-C to the workers too: they inherit from here that it is ignored
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
