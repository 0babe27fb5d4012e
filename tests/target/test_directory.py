"""Targets in local folders: modes of files, what is read-only, and the exchange of folders."""

import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest
import zarr
from stores import create, overlaid, some, stored
from zarr.storage import LocalStore, MemoryStore, StorePath

import daskclip
from daskclip import clip_zarr, plan_zarr, stats_zarr, verify_zarr
from daskclip.errors import TargetError, TargetExistsError, TargetPermissionError
from daskclip.storage import StoredArray

NOBODY = 65534


def make_group(path):
    zarr.create_group(path)
    for name in ("a", "b"):
        create(path / name, some((8, 8), "f4"), (2, 8), compressors=None)
    return path


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("limit", [1.0, 1e9], ids=["encoded", "copied"])
@pytest.mark.parametrize("way", ["new", "overwrite", "in place"])
def test_files_and_folders_have_the_modes_that_the_umask_leaves(tmp_path, umask, limit, way):
    source = make_group(tmp_path / "x")
    made = tmp_path / "y"
    if way == "overwrite":
        make_group(made)
    if way == "in place":
        clip_zarr(source, None, limit, in_place=True)
        made = source
    else:
        clip_zarr(source, made, limit, overwrite=way == "overwrite")
    stats_zarr(source / "a", axes=1, save_norms=tmp_path / "norms")
    for path in (made, *made.rglob("*"), *(tmp_path / "norms").rglob("*")):
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~umask, path


def read_only_forms(path):
    """An array or group at a path, opened read-only in every way that zarr has."""
    store = LocalStore(path, read_only=True)
    opened = zarr.open(path, mode="r")
    return {"store": store, "store path": StorePath(store), "opened": opened}


FORMS = ["store", "store path", "opened"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [".", "a"])
@pytest.mark.parametrize("function", [clip_zarr, plan_zarr])
def test_what_is_open_read_only_is_not_clipped_in_place(tmp_path, form, name, function):
    path = make_group(tmp_path / "x") / name
    before = stored(tmp_path)
    with pytest.raises(TargetPermissionError, match="is open read-only; open it") as caught:
        function(read_only_forms(path)[form], None, 1.0, in_place=True)
    assert "\n" not in str(caught.value)
    assert stored(tmp_path) == before


@pytest.mark.parametrize("form", FORMS)
def test_a_target_that_is_open_read_only_is_not_replaced(tmp_path, form):
    source = make_group(tmp_path / "x")
    target = read_only_forms(make_group(tmp_path / "y"))[form]
    before = stored(tmp_path)
    with pytest.raises(TargetPermissionError, match="is open read-only; open it"):
        clip_zarr(source, target, 1.0, overwrite=True)
    assert stored(tmp_path) == before


def test_a_new_target_in_a_read_only_store_is_refused(tmp_path):
    source = make_group(tmp_path / "x")
    for store in (LocalStore(tmp_path / "y", read_only=True), MemoryStore(read_only=True)):
        with pytest.raises((TargetError, TargetPermissionError)):
            clip_zarr(source, StorePath(store, "z"), 1.0)
    assert [*tmp_path.iterdir()] == [source]


def test_what_is_open_read_only_is_a_source(tmp_path):
    path = make_group(tmp_path / "x")
    for form, source in read_only_forms(path).items():
        assert clip_zarr(source, tmp_path / form, 1.0).arrays == 2


@pytest.mark.parametrize("limit", [1.0, 1e9, "p50"])
@pytest.mark.parametrize("way", [{"overwrite": True}, {"in_place": True}], ids=str)
def test_folders_that_cannot_be_exchanged_are_told_before_a_chunk_is_read(
    tmp_path, monkeypatch, limit, way
):
    """As in a container image: folders of a lower layer of overlayfs cannot be renamed."""
    make_group(tmp_path / "lower" / "x")
    make_group(tmp_path / "lower" / "y")
    reads = []
    monkeypatch.setattr(StoredArray, "read", lambda *_: reads.append(1))
    with overlaid(tmp_path) as point:
        before = stored(point)
        target = None if "in_place" in way else point / "y"
        with pytest.raises(TargetError, match="cannot exchange folders") as caught:
            clip_zarr(point / "x", target, limit, **way)
        assert "\n" not in str(caught.value)
        assert stored(point) == before
    assert not reads


@pytest.mark.parametrize("way", [{"overwrite": True}, {"in_place": True}], ids=str)
def test_folders_of_the_upper_layer_are_exchanged(tmp_path, way):
    make_group(tmp_path / "lower" / "x")
    with overlaid(tmp_path) as point:
        make_group(point / "y")
        source, target = (point / "y", None) if "in_place" in way else (point / "x", point / "y")
        assert clip_zarr(source, target, 1.0, **way).status == "clipped"
        verify_zarr(point / "y")
        assert sorted(path.name for path in point.iterdir()) == ["x", "y"]


@pytest.fixture
def nobody():
    """A user who is not root, from here to the end of the test, and a folder for all users."""
    if os.geteuid():
        pytest.skip("another user's folder takes root to make")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        os.seteuid(NOBODY)
        can_read = os.access(daskclip.__file__, os.R_OK, effective_ids=True)
        os.seteuid(0)
        if not can_read:
            pytest.skip("another user cannot read the files of daskclip")
        yield Path(folder)
        os.seteuid(0)


@pytest.mark.parametrize("limit", [1.0, 1e9, "p50"])
@pytest.mark.parametrize("mode", [0o1777, 0o777], ids=["sticky", "open"])
@pytest.mark.parametrize("folder_mode", [0o755, 0o555], ids=oct)
def test_an_empty_folder_that_cannot_be_replaced_is_told_before_a_chunk_is_read(
    nobody, monkeypatch, limit, mode, folder_mode
):
    """As in ``/tmp``, where only owners may remove; elsewhere a folder's own mode is no matter."""
    source = make_group(nobody / "x")
    place = nobody / "place"
    for path in (place, place / "empty", place / "norms"):
        path.mkdir()
        path.chmod(folder_mode)
    place.chmod(mode)
    os.seteuid(NOBODY)
    if mode == 0o777:
        assert clip_zarr(source, place / "empty", limit).arrays == 2
        stats_zarr(source / "a", save_norms=place / "norms")
        return
    reads = []
    monkeypatch.setattr(StoredArray, "read", lambda *_: reads.append(1))
    for call in (
        lambda: clip_zarr(source, place / "empty", limit),
        lambda: stats_zarr(source / "a", save_norms=place / "norms"),
    ):
        with pytest.raises(TargetPermissionError, match="empty folder that cannot be replaced"):
            call()
    assert not reads
    assert sorted(path.name for path in place.iterdir()) == ["empty", "norms"]
    (place / "mine").mkdir()
    monkeypatch.undo()
    assert clip_zarr(source, place / "mine", limit).arrays == 2


def test_a_run_that_ends_while_its_folder_is_looked_at_is_another_run(tmp_path, monkeypatch):
    x, mkdir = create(tmp_path / "x", some((4, 4), "f4"), (2, 4)), os.mkdir

    def ending(path, *args):
        if Path(path).name == ".y.daskclip":  # it was there, and is removed before the next look
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        mkdir(path, *args)

    monkeypatch.setattr(os, "mkdir", ending)
    with pytest.raises(TargetExistsError, match="is being written by another run"):
        clip_zarr(x, tmp_path / "y", 1.0)
