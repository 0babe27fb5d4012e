"""Verify a target against the record of its run and, if that is given, its source."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace

import numpy as np

from daskclip.engine import stages
from daskclip.engine.attempt import array_tasks
from daskclip.engine.cluster import leaving_worker_pool
from daskclip.engine.passes import Passes
from daskclip.engine.request import LimitsByArray, limits_identity, open_limits
from daskclip.engine.run_record import plan_from_json, replan
from daskclip.errors import (
    DaskClipError,
    SourceNotFoundError,
    VerificationError,
    interrupts_first,
)
from daskclip.report import VerifyReport
from daskclip.storage import Hierarchy, open_source, translating_storage_errors
from daskclip.target import DirectoryTarget, Target, find_target, journal


@dataclass(frozen=True, slots=True)
class MadeByRun:
    """Target of a run, with the record of the run that is kept in it."""

    target: Target
    run: journal.RunRecord
    fingerprint: journal.Json
    """Fingerprint of the target when it was complete."""
    others: int
    """Digest of the files that belong to no array."""
    digests: stages.Digests
    """Digest of the files of each block, by its number."""
    largest_norm_after: float
    """Upper bound of all norms, in the report of the run."""


@interrupts_first()
@leaving_worker_pool()
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
        norm above the limit or above `ClipReport.largest_norm_after`, or a record that is missing
        or damaged.
    DaskClipError
        Another of its kinds, as by `clip_zarr`: target or source cannot be read.

    See Also
    --------
    clip_zarr : Writes the array and its record.

    Notes
    -----
    Checks that exactly the files of chunks are there, the digest of the files of each block and of
    all other files in a group, and the exact norm of each slice. Reads the target twice, and with a
    source three times and the source twice, within the memory of the run that is verified.

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
            raise SourceNotFoundError(
                f"target {found} does not exist, or is an empty folder; check the path"
            )
        made = _read_record(found)
        written = _open_written(made)
        limits_by_array = _same_limits(made, written, limits)
        again = None if source is None else open_source(source)
        if again is not None:
            _check_source(again, written, made)
        total = _verify(made, written, again, limits_by_array).total
    return VerifyReport(
        target=str(found),
        source=None if again is None else str(again),
        run=made.run.id,
        clip_norm=made.run.clip_norm,
        blocks=len(made.digests),
        slices=total.slices,
        nonfinite=total.nonfinite,
        largest_norm=total.largest if total.slices > total.nonfinite else None,
        largest_norm_after=made.largest_norm_after,
        seconds=time.monotonic() - started,
    )


def _verify(
    made: MadeByRun, written: Hierarchy, source: Hierarchy | None, limits_by_array: LimitsByArray
) -> Passes:
    """Check files and norms, and compare with what the source gives, if there is one."""
    # 'raise' would stop at the first NaN; a run that raised has no complete target to verify
    policy = made.run.parameters["nonfinite"]
    policy = "propagate" if policy == "raise" else policy
    run = replace(made.run, parameters=made.run.parameters | {"nonfinite": policy})
    plan = replan(run, of="verifying needs with")
    # missing="error" is about the source; what the target lacks, its digests show. Slices that are
    # not finite became zeros: one in the target is wrong, and must not count as zeros again
    own = {"missing": "fill", "nonfinite": "propagate" if policy == "zero" else policy}
    filled = replace(run, parameters=run.parameters | own)
    arrays = array_tasks(filled, plan, written, {}, limits_by_array)
    with Passes.open(arrays, plan) as norms:
        # files first: a digest names the block, while a norm may be wrong for many reasons
        stages.check(norms, made.digests, range(len(arrays)))
        stages.measure(norms)
    total = norms.total
    if total.clipped:
        above = "its limit" if run.clip_norm is None else f"{run.clip_norm:g}"
        raise VerificationError(
            f"{total.clipped} slices of {made.target} have a norm above {above}, up to "
            f"{total.largest:.17g}; clip it again"
        )
    # the norms of what is there give a bound too, whatever was written
    if not (total.largest_after <= made.largest_norm_after or math.isnan(made.largest_norm_after)):
        raise VerificationError(
            f"norms of {made.target} reach {total.largest_after!r}, above the largest_norm_after "
            f"{made.largest_norm_after!r} of its report; clip it again"
        )
    if source is not None:
        arrays = array_tasks(run, plan, source, written.arrays, limits_by_array)
        with Passes.open(arrays, plan) as both:
            stages.compare(both)
            # arrays that were only copied have the same files as the source
            stages.check(both, made.digests, both.copied)
    return norms


def _open_written(made: MadeByRun) -> Hierarchy:
    """Open what a run wrote; requires its metadata, and no file but those of chunks."""
    target = made.target
    try:
        # a path is opened with its errors translated, which `Hierarchy.open` does not do
        place = target.path if isinstance(target, DirectoryTarget) else target.open().store_path
        written = open_source(place)
        if written.fingerprint(changes=False)["metadata"] != made.fingerprint["metadata"]:
            raise VerificationError(f"metadata of {target} is not what was written; clip it again")
        for name, array in written.arrays.items():
            for key in array.stray_keys():
                inside = f"{name}/{key}".lstrip("/")
                raise VerificationError(f"{target}/{inside} is no chunk of the array; remove it")
        if written.copy_others() != made.others:
            raise VerificationError(
                f"files of {target} that belong to no array are not what was written; clip it again"
            )
    except DaskClipError as error:
        raise VerificationError(str(error)) from error
    return written


def _same_limits(made: MadeByRun, written: Hierarchy, limits: object) -> LimitsByArray:
    """Open the limits that a run had, if it had any."""
    axes_by_array = {name: plan.axes for name, plan in plan_from_json(made.run).clipped.items()}
    common = made.run.parameters["global_norm"]
    limits_by_array = open_limits(limits, None, written, axes_by_array, None, in_common=common)
    # by identity, which is shape and digest: the limits themselves are not stored
    was, given = made.run.parameters["limits"], limits_identity(limits_by_array)
    if given != was:
        raise VerificationError(f"{written} was clipped with limits {was}, not {given}; give those")
    return limits_by_array


def _read_record(target: Target) -> MadeByRun:
    with target.journals() as (path, _):
        run = journal.header(path)
        if run is None:
            raise VerificationError(
                f"target {target} has no record of a run: it was not clipped, or there was nothing "
                "to clip in place; verify what daskclip run wrote"
            )
        if not run.is_readable:
            raise VerificationError(
                f"target {target} has a record of version {run.version}; verify it with the "
                "daskclip that wrote it"
            )
        digests = np.zeros(plan_from_json(run).blocks, np.uint64)
        for record in journal.records(path):
            if isinstance(record, journal.BlocksRecord):
                for number, digest in (record.target or {}).items():
                    digests[number] = digest
        # the final record is the last line, unless the end of the journal is torn
        if not isinstance(record, journal.FinalRecord) or not (record.made and record.report):
            raise VerificationError(f"the record of {target} is damaged; clip it again")
    bound = record.report["largest_norm_after"]
    return MadeByRun(target, run, record.made, record.others or 0, digests, bound)


def _check_source(source: Hierarchy, written: Hierarchy, made: MadeByRun) -> None:
    """Require arrays of the same names, shapes and dtypes, and the same files beside them."""
    both, target = (source.arrays, written.arrays), made.target
    # an array of a group may be missing on either side
    for name in sorted(both[0].keys() | both[1].keys()):
        found = (arrays.get(name) for arrays in both)
        one, other = (f"{a.dtype} of shape {a.shape}" if a else "missing" for a in found)
        if one != other:
            what = f" array {name}" if name else ""
            kinds = f"source {source}{what} is {one}, target {target} {other}"
            raise VerificationError(f"{kinds}; give the source that it was made from")
    if source.copy_others() != made.others:
        raise VerificationError(
            f"files of source {source} that belong to no array differ from those of {target}; give "
            "the source that it was made from"
        )
