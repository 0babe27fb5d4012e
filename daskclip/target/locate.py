"""Targets by what a caller names: a folder, or a prefix in an object store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from daskclip.errors import TargetError, TargetPermissionError, error_text, short_repr
from daskclip.storage import Hierarchy, parse_location, read_only_protocol
from daskclip.target.directory import DirectoryTarget, DirectoryTransaction
from daskclip.target.object_store import (
    ObjectStoreTarget,
    ObjectStoreTransaction,
    cannot_be_written,
)

Target = DirectoryTarget | ObjectStoreTarget
"""Place of an array or group; both have the same methods, and `locked` begins a run."""
Transaction = DirectoryTransaction | ObjectStoreTransaction
"""A run under the lock of its target: begin, stage, publish, clear; both have these methods."""


def open_target(
    target: object,
    source: Hierarchy,
    options: dict[str, Any] | None,
    *,
    overwrite: bool,
    in_place: bool,
) -> Target:
    """Find a target and check that it can be made; changes nothing.

    In place, ``target`` is what the caller named as the source: it may be open read-only.
    """
    # first: fsspec would look for the zip file to be made
    if not in_place and (protocol := read_only_protocol(target)):
        raise cannot_be_written(protocol)
    if in_place and source.is_flat:
        raise TargetError(
            f"source {source} is a flat file, which is not clipped in place; give a target"
        )
    found = find_target(source.store_path if in_place else target, options)
    if getattr(target, "read_only", False):
        raise TargetPermissionError(f"target {found} is open read-only; open it to write")
    found.check(source, overwrite=overwrite, in_place=in_place)
    return found


def find_target(target: object, options: dict[str, Any] | None = None) -> Target:
    """Find a target, which may not exist."""
    try:
        found = parse_location(target, options)
    except ImportError as error:
        why = error_text(error)
        raise TargetError.about(
            "target", target, f"needs what is not installed ({why}); install it"
        ) from error
    except Exception as error:  # fsspec and its file systems raise errors of any kind
        raise TargetError(
            f"target {short_repr(target)} cannot be used ({error_text(error)}); check the URL, and "
            "that what it needs is installed"
        ) from error
    if isinstance(found, tuple):
        return ObjectStoreTarget(*found)
    if found is None:
        raise TargetError(
            f"target {short_repr(target)} is not a path; give a path, a URL or a zarr store"
        )
    if "\0" in found:
        raise TargetError(f"target {short_repr(found)} is no path: it holds NUL; remove it")
    path = Path(found)
    if path.suffix.lower() == ".zip" and not path.is_dir():
        raise TargetError(
            f"target {path} would be a zip file, which cannot be written in parts; clip to a "
            "folder and zip that"
        )
    if path.suffix.lower() in (".npy", ".safetensors") and not path.exists():
        raise TargetError(
            f"target {path} would be a folder with the name of a flat file; "
            f"name it {path.stem}.zarr"
        )
    # of "." and "..": the target needs a name, to put a work directory and a rename beside it
    if path.name in ("", ".."):
        path = path.resolve()
    # the last part stays: a link there is refused, and not followed
    return DirectoryTarget(Path(os.path.realpath(path.parent), path.name))
