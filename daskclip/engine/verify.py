"""An array that was written, held against the record of its run and against its source."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from daskclip.engine.attempt import array_tasks
from daskclip.engine.cluster import running
from daskclip.engine.measure import scratch_passes
from daskclip.engine.request import limits_identity, open_limits
from daskclip.engine.run_record import VERSION, plan_from_json, replan
from daskclip.errors import DaskClipError, SourceNotFoundError, VerificationError
from daskclip.report import VerifyReport
from daskclip.storage import Hierarchy, open_source, translating_storage_errors
from daskclip.target import DirectoryTarget, Entry, Target, find_target, journal
from daskclip.worker import drain


def verify_zarr(
    target: str | os.PathLike[str], source: Any = None, *, limits: Any = None
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
    place = find_target(target)
    with translating_storage_errors(f"verifying {place}"):
        if not place.exists():
            raise SourceNotFoundError(f"target {place} does not exist; check the path")
        with place.journals() as (record, _):
            run, made, digests = _record(place, record)
        plan = replan(run, plan_from_json(run).memory)
        try:
            there = open_source(
                place.path if isinstance(place, DirectoryTarget) else place.open().store_path
            )
            _check_keys(there, place, made)
        except DaskClipError as error:
            raise VerificationError(str(error)) from error
        parameters = run["parameters"]
        each = _same_limits(there, limits, run)
        limit = None if each else float(run.get("limit", parameters["clip_norm"]))
        common: dict[str, Any] = {"staged": None, "in_place": False, "clip_norm": limit}
        omit = "omit" if parameters["nonfinite"] == "omit" else "propagate"
        common |= {"ord": parameters["ord"], "nonfinite": omit}
        attempt = uuid4().hex
        jobs = array_tasks(plan, there, None, attempt, each, missing="fill", **common)
        again = None if source is None else open_source(source)
        if again is not None:
            _check_source(again, there, place)
        with running(plan.threads, partial(drain, jobs[0].attempt_id)) as how:
            with scratch_passes(jobs, how, plan.window) as norms:
                norms.check(digests, range(len(jobs)))
                norms.measure()
            total = norms.total
            if total.clipped:
                above = "its limit" if limit is None else f"{limit:g}"
                raise VerificationError(
                    f"{total.clipped} slices of {place} have a norm above {above}, up to "
                    f"{total.largest:.17g}; clip it again"
                )
            if again is not None:
                common |= {"missing": parameters["missing"]}
                both = array_tasks(plan, again, there, attempt, each, **common)
                with scratch_passes(both, how, plan.window) as comparison:
                    comparison.compare()
                    comparison.check(digests, comparison.copied)
    return VerifyReport(
        target=str(place),
        source=None if again is None else str(again),
        run=run["run"],
        clip_norm=limit,
        blocks=plan.blocks,
        slices=total.slices,
        nonfinite=total.nonfinite,
        largest_norm=total.largest if total.slices > total.nonfinite else None,
        seconds=time.monotonic() - started,
    )


def _same_limits(there: Hierarchy, limits: Any, run: Entry) -> dict[str, Any]:
    """Those a run had, if it had any."""
    over = {name: plan.axes for name, plan in plan_from_json(run).clipped.items()}
    each = open_limits(limits, None, there, over, None)
    was, given = run["parameters"]["limits"], limits_identity(each)
    if given != was:
        raise VerificationError(f"{there} was clipped with limits {was}, not {given}; give those")
    return each


def _record(place: Target, path: Path) -> tuple[Entry, Entry, Any]:
    """What the record says of the run, of the files it made, and their digests by block."""
    run = journal.header(path)
    if run is None or run.get("version") != VERSION:
        raise VerificationError(
            f"target {place} has no record of a run that this daskclip can read; clip it again"
        )
    digests = np.zeros(plan_from_json(run).blocks, np.uint64)
    made = None
    for entry, _ in journal.entries(path):
        made = entry.get("made")
        for number, digest in entry.get("target", {}).items():
            digests[int(number)] = digest
    if made is None:
        raise VerificationError(f"the record of {place} is damaged; clip it again")
    return run, made, digests


def _check_keys(there: Hierarchy, place: Target, made: Entry) -> None:
    """Require the metadata that was written, and no file but those of chunks."""
    if there.fingerprint(changes=False)["metadata"] != made["metadata"]:
        raise VerificationError(f"the metadata of {place} is not what was written; clip it again")
    for name, array in there.arrays.items():
        for key in array.stray_keys():
            inside = f"{name}/{key}".lstrip("/")
            raise VerificationError(f"{place}/{inside} is no chunk of the array; remove it")


def _check_source(source: Hierarchy, there: Hierarchy, place: Target) -> None:
    """Require arrays of the same names, shapes and dtypes."""
    kinds = [
        {n: f"{a.dtype} of shape {a.shape}" for n, a in h.arrays.items()} for h in (source, there)
    ]
    for name in sorted(kinds[0].keys() | kinds[1].keys()):
        one, other = (kind.get(name, "missing") for kind in kinds)
        if one != other:
            what = f" array {name}" if name else ""
            raise VerificationError(
                f"source {source}{what} is {one}, target {place} {other}; give the source that it "
                "was made from"
            )
