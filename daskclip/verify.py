"""An array that was written, held against the record of its run and against its source."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from daskclip import journal, storage, tasks
from daskclip.errors import DaskClipError, SourceNotFoundError, VerificationError
from daskclip.journal import Entry
from daskclip.measure import unkept
from daskclip.publish import Folder
from daskclip.report import VerifyReport
from daskclip.resume import VERSION, plan_of, planned
from daskclip.retries import failing
from daskclip.sources import open_source
from daskclip.targets import Target, find_target
from daskclip.tasks import Job
from daskclip.workers import running


def verify_zarr(target: str | os.PathLike[str], source: Any = None) -> VerifyReport:
    """Verify an array that `clip_zarr` wrote.

    Parameters
    ----------
    target : str or path
        Array of any shape, with the record of its run.
    source : str, path or zarr.Array, optional
        What it was made from, to derive each block again and compare it bit for bit.

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
    with failing(f"verifying {place}"):
        if not place.exists():
            raise SourceNotFoundError(f"target {place} does not exist; check the path")
        with place.journals() as (record, _):
            run, made, digests = _record(place, record)
        try:
            array = open_source(place.path if isinstance(place, Folder) else place.open())
            _check_keys(array, place, made)
        except DaskClipError as error:
            raise VerificationError(str(error)) from error
        parameters = run["parameters"]
        job = Job(
            run=uuid4().hex,
            plan=planned(run, plan_of(run).memory),
            source=array,
            target=None,
            staged=None,
            in_place=False,
            clip_norm=float(run.get("limit", parameters["clip_norm"])),
            nonfinite="omit" if parameters["nonfinite"] == "omit" else "propagate",
            missing="fill",
        )
        again = None if source is None else open_source(source)
        if again is not None and (again.shape, again.dtype) != (array.shape, array.dtype):
            raise VerificationError(
                f"source {storage.location(again)} is {again.dtype} of shape {again.shape}, target "
                f"{place} {array.dtype} of {array.shape}; give the source that it was made from"
            )
        with running(job.plan.threads, partial(tasks.end, job.run)) as how:
            with unkept(job, how) as norms:
                norms.check(digests)
                norms.measure()
            total = norms.total
            if total.clipped:
                raise VerificationError(
                    f"{total.clipped} slices of {place} have a norm above {job.clip_norm:g}, up to "
                    f"{total.largest:.17g}; clip it again"
                )
            if again is not None:
                job = replace(
                    job,
                    source=again,
                    target=array,
                    missing=parameters["missing"],
                )
                with unkept(job, how) as comparison:
                    comparison.compare()
    return VerifyReport(
        target=str(place),
        source=None if again is None else storage.location(again),
        run=run["run"],
        clip_norm=job.clip_norm,
        blocks=job.plan.blocks,
        slices=total.slices,
        nonfinite=total.nonfinite,
        largest_norm=total.largest if total.slices > total.nonfinite else None,
        seconds=time.monotonic() - started,
    )


def _record(place: Target, path: Path) -> tuple[Entry, Entry, Any]:
    """What the record says of the run, of the files it made, and their digests by block."""
    run = journal.header(path)
    if run is None or run.get("version") != VERSION:
        raise VerificationError(
            f"target {place} has no record of a run that this daskclip can read; clip it again"
        )
    digests = np.zeros(plan_of(run).blocks, np.uint64)
    made = None
    for entry, _ in journal.entries(path):
        made = entry.get("made")
        for number, digest in entry.get("target", {}).items():
            digests[int(number)] = digest
    if made is None:
        raise VerificationError(f"the record of {place} is damaged; clip it again")
    return run, made, digests


def _check_keys(array: Any, place: Target, made: Entry) -> None:
    """Require the metadata that was written, and no file but those of chunks."""
    if storage.fingerprint(array, changes=False)["metadata"] != made["metadata"]:
        raise VerificationError(f"the metadata of {place} is not what was written; clip it again")
    for key, cell in storage.cells(array):
        if cell is None and key not in storage.METADATA:
            raise VerificationError(f"{place}/{key} is no chunk of the array; remove it")
