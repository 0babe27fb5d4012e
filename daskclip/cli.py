"""The command line: strings in, `clip_zarr` below, text or JSON out."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import dask

from daskclip.engine import clip_zarr, plan_zarr, stats_zarr, verify_zarr
from daskclip.engine import discard as discard_run
from daskclip.engine import status as status_of
from daskclip.errors import DaskClipError, InvalidValueError
from daskclip.report import as_document, as_page, as_text

EXIT_CODES = """\b
Exit codes: 0 done or up to date, 1 storage failure or bug (run again to resume),
2 command line not understood, 3 a parameter or the source rejected,
4 verification failed, 5 the target exists, is being written or has an unfinished
run with other parameters, 75 interrupted or temporarily failed: run again."""
INTERRUPTED = 75
CONFIGURED = ("memory", "nonfinite", "missing", "progress")


class _Limit(click.ParamType[Any]):
    """A number, or a quantile of the norms."""

    name = "float or p99"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        quantile = isinstance(value, str) and value.startswith("p")
        return value if quantile else click.FLOAT.convert(value, param, ctx)


WRITTEN = click.Path(dir_okay=False, path_type=Path)
READING = (
    click.option(
        "--progress",
        type=click.Choice(["auto", "bar", "lines", "json", "none"]),
        default="auto",
        help="What stderr shows.",
    ),
    click.option("--report", type=WRITTEN, help="Write the JSON."),
    click.option("--html", type=WRITTEN, help="Write a page of figures and pictures."),
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    click.option(
        "--missing",
        type=click.Choice(["fill", "error"]),
        default="fill",
        help="Chunks that are not stored: take the fill value, or stop.",
    ),
    click.option(
        "--nonfinite",
        type=click.Choice(["propagate", "omit", "raise"]),
        default="propagate",
        help="What NaN and infinity do to their slice.",
    ),
    click.option("--workers", type=click.IntRange(min=1), help="Start N local processes."),
    click.option("--scheduler", help="Address, or scheduler file, of a Dask cluster."),
    click.option("--memory", default="512MiB", show_default=True, help="Budget a process."),
    click.option("--exclude", multiple=True, help="Of a group: arrays that stay as they are."),
    click.option("--include", multiple=True, help="Of a group: clip these only: 'layers/*'."),
    click.option("--ord", type=click.Choice(["1", "2", "inf"]), default="2", help="Which norm."),
    click.option("--dim", help="Or the names of their dimensions: time,lat."),
    click.option("--axes", help="Axes of a norm, such as 0,2; all by default, '' for none."),
)
WRITING = (
    click.option("--in-place", is_flag=True, help="Replace SOURCE; there is no TARGET."),
    click.option("--overwrite", is_flag=True, help="Replace an array at TARGET."),
    click.option("--dry-run", is_flag=True, help="Check and plan only."),
    click.option("--norms", help="Take those that stats --save-norms wrote."),
    click.option("--global", "global_norm", is_flag=True, help="Of a group: one norm of all."),
    click.option("--limits", help="Or a Zarr array of a limit for each slice."),
    click.option(
        "--clip-norm",
        type=_Limit(),
        help="The limit; p99 for the norm that 99 % of the slices do not exceed.",
    ),
    click.argument("target", required=False),
)


def _options(*options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What a command takes beside SOURCE; shown from the last to the first."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in (*options, click.argument("source")):
            command = option(command)
        return command

    return decorate


class _Group(click.Group):
    """Says what it did not understand on one line, as it does for everything else."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _failing_in_one_line():
            defaults = _defaults()
        with _understood():
            extra["default_map"] = dict.fromkeys(("run", "plan", "stats"), defaults)
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _understood():
            return super().invoke(ctx)


def _defaults() -> dict[str, Any]:
    """Defaults of options in Dask's configuration, from its files and the environment."""
    defaults = dask.config.get("daskclip", None) or {}
    for name in defaults:
        if name not in CONFIGURED:
            raise InvalidValueError(
                f"dask's configuration has daskclip.{name}, which is unknown; use one of "
                f"{', '.join(CONFIGURED)}"
            )
    return {name: str(value) for name, value in defaults.items()}


@contextmanager
def _understood() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        text = " ".join(error.format_message().split())
        click.echo(f"daskclip: {text[:1].lower()}{text[1:].rstrip('.')}; see --help", err=True)
        sys.exit(error.exit_code)


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
    # of zarr, about codecs and dtypes outside its specification: stderr has one line an event
    warnings.simplefilter("ignore")


@main.command(epilog=EXIT_CODES)
@_options(*READING, *WRITING)
def run(dry_run: bool, **options: Any) -> None:
    """Clip an array or a group SOURCE into a new TARGET; resumes a run that was stopped."""
    _call(plan_zarr if dry_run else clip_zarr, **options)


@main.command(epilog=EXIT_CODES)
@_options(*READING, *WRITING)
def plan(dry_run: bool, **options: Any) -> None:
    """Say what run would do with the same words, without reading a chunk."""
    _call(plan_zarr, **options)


@main.command(epilog=EXIT_CODES)
@_options(*READING, click.option("--save-norms", help="Write the norms, for run --norms."))
def stats(**options: Any) -> None:
    """Say how large the norms of SOURCE are, and what a limit would clip."""
    _call(stats_zarr, **options)


@main.command(epilog=EXIT_CODES)
@click.argument("target")
@click.option("--source", help="Derive every block again and compare it.")
@click.option("--limits", help="Those that run had.")
def verify(target: str, source: str | None, limits: str | None) -> None:
    """Check what run wrote: its files, its norms and, with its source, every bit."""
    with _failing_in_one_line():
        click.echo(as_text(verify_zarr(target, source, limits=limits)))


@main.command(epilog=EXIT_CODES)
@click.argument("target")
def status(target: str) -> None:
    """Say what there is at TARGET and whether a run is unfinished."""
    with _failing_in_one_line():
        for name, value in status_of(target).items():
            click.echo(f"{name:<10}  {value}")


@main.command(epilog=EXIT_CODES)
@click.argument("target")
def discard(target: str) -> None:
    """Remove what an unfinished run to TARGET has done; TARGET stays as it is."""
    with _failing_in_one_line():
        click.echo("discarded" if discard_run(target) else "there is no unfinished run")


def _call(
    function: Callable[..., Any],
    *,
    report: Path | None,
    html: Path | None,
    as_json: bool,
    scheduler: str | None,
    workers: int | None,
    axes: str | None,
    dim: str | None,
    ord: str,
    **options: Any,
) -> None:
    if function is not stats_zarr and options["clip_norm"] is options["limits"] is None:
        raise click.UsageError("Missing option '--clip-norm' or '--limits'.")
    with _failing_in_one_line(), _workers(scheduler, workers, options["progress"]):
        for path in (report, html):
            if path is not None and not path.absolute().parent.is_dir():
                folder = path.absolute().parent
                raise InvalidValueError(f"folder {folder} of the report does not exist; create it")
        if html is not None and function is not stats_zarr:
            options["pictures"] = True
        result = function(axes=_axes(axes), dim=_names(dim), ord=float(ord), **options)
        if report is not None:
            report.write_text(as_document(result) + "\n")
        if html is not None:
            html.write_text(as_page(result), encoding="utf-8")
        click.echo(as_document(result) if as_json else as_text(result))


def _axes(axes: str | None) -> list[int] | None:
    try:
        return None if axes is None else [int(a) for a in axes.split(",") if a.strip()]
    except ValueError:
        raise InvalidValueError(f"axes {axes!r} is not a list of integers; write 0,2") from None


def _names(dim: str | None) -> list[str] | None:
    return None if dim is None else [name.strip() for name in dim.split(",") if name.strip()]


@contextmanager
def _workers(scheduler: str | None, workers: int | None, progress: str) -> Iterator[None]:
    """A cluster to run on, if one was asked for."""
    if scheduler is None and workers is None:
        yield
        return
    if scheduler is not None and workers is not None:
        raise click.UsageError("--scheduler and --workers exclude each other")
    # only here: distributed takes a second to import
    from distributed import Client, LocalCluster

    # what they log of a lost cluster is told on one line here
    noisy = [n for n in logging.root.manager.loggerDict if n.startswith("distributed")]
    for name in (*noisy, "asyncio", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    if scheduler is not None:
        where = {"scheduler_file" if os.path.isfile(scheduler) else "address": scheduler}
        try:
            client = Client(**where, timeout=10)
        except (OSError, ValueError) as error:
            raise InvalidValueError(
                f"no Dask scheduler answers at {scheduler} ({type(error).__name__}); "
                "check the address"
            ) from error
        with client:
            _tell_dashboard(client, progress)
            yield
        return
    # a terminal sends Ctrl-C to the workers too
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with cluster, Client(cluster) as client:
        _tell_dashboard(client, progress)
        yield


def _tell_dashboard(client: Any, progress: str) -> None:
    link = client.dashboard_link
    if link and progress != "none":
        as_json = json.dumps({"dashboard": link})
        click.echo(as_json if progress == "json" else f"daskclip: dashboard at {link}", err=True)


@contextmanager
def _failing_in_one_line() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except DaskClipError as error:
        click.echo(f"daskclip: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("daskclip: interrupted; run the same command again to resume", err=True)
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)
