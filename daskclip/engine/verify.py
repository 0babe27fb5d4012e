"""Verify a target against the record of its run and, if that is given, its source."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np

from daskclip.engine import rounds
from daskclip.engine.attempt import array_tasks, scratch_journal
from daskclip.engine.cluster import running
from daskclip.engine.passes import Passes
from daskclip.engine.request import LimitsByArray, limits_identity, open_limits
from daskclip.engine.run_record import plan_from_json, replan
from daskclip.errors import DaskClipError, SourceNotFoundError, VerificationError
from daskclip.numerics import SliceCounts
from daskclip.plan import GroupPlan
from daskclip.report import VerifyReport
from daskclip.storage import Hierarchy, open_source, translating_storage_errors
from daskclip.target import (
    DirectoryTarget,
    FinalRecord,
    Json,
    RunRecord,
    Target,
    WindowRecord,
    find_target,
    journal,
)
from daskclip.worker import drain


def verify_zarr(
    target: str | os.PathLike[str], source: object = None, *, limits: object = None
) -> VerifyReport:
    """Verify an array that `clip_zarr` wrote.

    Parameters
    ----------
    target : str or path
        Array of any shape, with the record of its run.
    source : str, path or zarr.Array, optional
        What it was made from, to derive each block again and compare it bit for bit.
    limits : NumPy array, str, path, zarr.Array or dict of these, optional
        Those that it was made with, if each slice had its own.

    Returns
    -------
    VerifyReport
        What was found right.

    Raises
    ------
    VerificationError
        A ValueError that names the first block, chunk or file that is not what the run wrote, a
        norm above the limit, or a record that is missing or damaged.
    DaskClipError
        Another of its kinds, as by `clip_zarr`: target or source cannot be read.

    See Also
    --------
    clip_zarr : Writes the array and its record.

    Notes
    -----
    Checks that exactly the files of chunks are there, the digest of the files of each block, and
    the norm of each slice. Reads the target twice, and with a source three times and the source
    twice, within the memory of the run that is verified.

    References
    ----------
    `tf.clip_by_norm <https://www.tensorflow.org/api_docs/python/tf/clip_by_norm>`_

    Examples
    --------
    >>> import tempfile, zarr
    >>> from daskclip import clip_zarr
    >>> folder = tempfile.mkdtemp()
    >>> x = zarr.create_array(f"{folder}/x", shape=(2, 2), chunks=(1, 2), dtype="float32")
    >>> x[:] = [[3, 4], [0.3, 0.4]]
    >>> report = clip_zarr(f"{folder}/x", f"{folder}/y", 1.0, axes=1)
    >>> verify_zarr(f"{folder}/y", source=f"{folder}/x").slices
    2
    """
    started = time.monotonic()
    found = find_target(target)
    with translating_storage_errors(f"verifying {found}"):
        if not found.exists():
            raise SourceNotFoundError(f"target {found} does not exist; check the path")
        with found.journals() as (record, _):
            run, made, digests = _read_record(found, record)
        plan = replan(run)
        written = _open_written(found, made)
        limits_by_array = _same_limits(written, limits, run, plan)
        again = None if source is None else open_source(source)
        if again is not None:
            _check_source(again, written, found)
        total = _verify(run, plan, written, again, limits_by_array, digests, found)
    return VerifyReport(
        target=str(found),
        source=None if again is None else str(again),
        run=run.id,
        clip_norm=run.clip_norm,
        blocks=plan.blocks,
        slices=total.slices,
        nonfinite=total.nonfinite,
        largest_norm=total.largest if total.slices > total.nonfinite else None,
        seconds=time.monotonic() - started,
    )


def _verify(
    run: RunRecord,
    plan: GroupPlan,
    written: Hierarchy,
    source: Hierarchy | None,
    limits_by_array: LimitsByArray,
    digests: rounds.Digests,
    target: Target,
) -> SliceCounts:
    """Check files and norms, and compare with what the source gives, if there is one."""
    attempt_id, limit, parameters = uuid4().hex, run.clip_norm, run.parameters
    # NaN is what a run that had to raise has not written
    omit = "omit" if parameters["nonfinite"] == "omit" else "propagate"
    parameters = parameters | {"nonfinite": omit}
    tasks = partial(array_tasks, plan, attempt_id=attempt_id, limits_by_array=limits_by_array)
    with running(plan.threads, partial(drain, attempt_id)) as compute_kwargs:
        arrays = tasks(written, None, parameters=parameters | {"missing": "fill"}, clip_norm=limit)
        with scratch_journal(run) as entries:
            everything = [None] * len(arrays)
            norms = Passes(arrays, compute_kwargs, entries, plan.window, everything)
            rounds.check(norms, digests, range(len(arrays)))
            rounds.measure(norms)
        total = norms.total
        if total.clipped:
            above = "its limit" if limit is None else f"{limit:g}"
            raise VerificationError(
                f"{total.clipped} slices of {target} have a norm above {above}, up to "
                f"{total.largest:.17g}; clip it again"
            )
        if source is not None:
            arrays = tasks(source, written, parameters=parameters, clip_norm=limit)
            with scratch_journal(run) as entries:
                both = Passes(arrays, compute_kwargs, entries, plan.window, everything)
                rounds.compare(both)
                rounds.check(both, digests, both.copied)
    return total


def _open_written(target: Target, made: Json) -> Hierarchy:
    """Open what a run wrote; requires its metadata, and no file but those of chunks."""
    try:
        place = target.path if isinstance(target, DirectoryTarget) else target.open().store_path
        written = open_source(place)
        _check_keys(written, target, made)
    except DaskClipError as error:
        raise VerificationError(str(error)) from error
    return written


def _same_limits(
    written: Hierarchy, limits: object, run: RunRecord, plan: GroupPlan
) -> LimitsByArray:
    """Open the limits that a run had, if it had any."""
    axes_by_array = {name: one.axes for name, one in plan.clipped.items()}
    limits_by_array = open_limits(limits, None, written, axes_by_array, None)
    was, given = run.parameters["limits"], limits_identity(limits_by_array)
    if given != was:
        raise VerificationError(f"{written} was clipped with limits {was}, not {given}; give those")
    return limits_by_array


def _read_record(target: Target, path: Path) -> tuple[RunRecord, Json, rounds.Digests]:
    """Read the record of a run: the run, fingerprint of what it made, and digests by block."""
    run = journal.header(path)
    if run is None or not run.is_readable:
        raise VerificationError(
            f"target {target} has no record of a run that this daskclip can read; clip it again"
        )
    digests = np.zeros(plan_from_json(run).blocks, np.uint64)
    made = None
    for record in journal.records(path):
        if isinstance(record, FinalRecord):
            made = record.made
        elif isinstance(record, WindowRecord):
            for number, digest in (record.target or {}).items():
                digests[number] = digest
    if made is None:
        raise VerificationError(f"the record of {target} is damaged; clip it again")
    return run, made, digests


def _check_keys(written: Hierarchy, target: Target, made: Json) -> None:
    if written.fingerprint(changes=False)["metadata"] != made["metadata"]:
        raise VerificationError(f"the metadata of {target} is not what was written; clip it again")
    for name, array in written.arrays.items():
        for key in array.stray_keys():
            inside = f"{name}/{key}".lstrip("/")
            raise VerificationError(f"{target}/{inside} is no chunk of the array; remove it")


def _check_source(source: Hierarchy, written: Hierarchy, target: Target) -> None:
    """Require arrays of the same names, shapes and dtypes."""
    kinds = [
        {n: f"{a.dtype} of shape {a.shape}" for n, a in h.arrays.items()} for h in (source, written)
    ]
    for name in sorted(kinds[0].keys() | kinds[1].keys()):
        one, other = (kind.get(name, "missing") for kind in kinds)
        if one != other:
            what = f" array {name}" if name else ""
            raise VerificationError(
                f"source {source}{what} is {one}, target {target} {other}; give the source that it "
                "was made from"
            )
