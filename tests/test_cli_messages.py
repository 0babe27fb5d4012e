"""Messages of the command line: the remedy is one that the caller has, and it works."""

import re
import shlex
import shutil

import numpy as np
import pytest
import zarr
from command_line import assert_fails, run
from reference import bits
from stores import create, finished, mounted, read, some

from daskclip import clip_by_norm, clip_zarr, norm, stats_zarr, verify_zarr
from daskclip.cli import main
from daskclip.errors import DTypeError, VerificationError

LIMIT = ["--clip-norm", 1]


@pytest.fixture
def source(tmp_path):
    return create(tmp_path / "x", some((5, 6), "f4"), (2, 4))


def remedy_of(done):
    """Command that a message tells to run."""
    return shlex.split(done.stderr.split("with: daskclip ")[1].split(" (and")[0].strip())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("verify", "verify takes TARGET; give the source as --source SOURCE"),
        ("status", "status takes TARGET"),
        ("discard", "discard takes TARGET"),
    ],
)
def test_commands_without_axes_say_what_they_take(source, tmp_path, command, words):
    for extra in ([source], [source, "third"]):
        done = run(command, tmp_path / "y", *extra)
        assert_fails(done, 2, "extra argument", extra[-1], words)
        for word in ("--axes", "dimensions", "--include"):
            assert word not in done.stderr


@pytest.mark.parametrize("command", ["run", "plan", "stats"])
def test_commands_with_axes_say_what_they_take_too(source, tmp_path, command):
    taken = "SOURCE" if command == "stats" else "SOURCE [TARGET]"
    done = run(command, source, tmp_path / "y", tmp_path / "z")
    assert_fails(done, 2, f"{command} takes {taken}; axes", tmp_path / "z")


@pytest.mark.parametrize("option", ["--axes", "--dim"])
@pytest.mark.parametrize("command", ["run", "plan", "stats"])
def test_several_axes_are_one_word(source, tmp_path, command, option):
    targets = [] if command == "stats" else [tmp_path / "y"]
    done = run(command, source, *targets, option, 0, 1)
    assert_fails(done, 2, "extra argument", "--axes 0,1", "repeat --include")


NAMES = {o for c in main.commands.values() for p in c.params for o in p.opts if o[:2] == "--"}


@pytest.mark.parametrize("command", main.commands)
def test_an_option_of_another_command_is_named_as_that(source, command):
    own = {o for p in main.commands[command].params for o in p.opts}
    for name in sorted(NAMES - own):
        (of,) = re.findall(r"which is one of ([a-z, ]*);", run(command, source, name, 1).stderr)
        for other in of.split(", "):
            assert name in {o for p in main.commands[other].params for o in p.opts}
    assert_fails(run(command, source, "--junk"), 2, "--junk")


def test_an_existing_target_names_what_replaces_it(source, tmp_path):
    target = tmp_path / "y"
    clip_zarr(source, target, 2.0)
    assert_fails(run("run", source, target, *LIMIT), 5, target, "overwrite it (--overwrite)")
    assert run("run", source, target, *LIMIT, "--overwrite").exit_code == 0
    assert_fails(run("run", source, source, *LIMIT), 5, source, "clip it in place (--in-place")
    assert_fails(run("run", source, source, *LIMIT, "--overwrite"), 3, "(--in-place")
    assert_fails(run("run", source, *LIMIT), 3, "(--in-place)")
    assert_fails(run("run", source, target, *LIMIT, "--in-place"), 3, "leave out the target")
    assert run("run", source, *LIMIT, "--in-place").exit_code == 0


def make_taken(tmp_path, kind, what):
    """Put something of a kind in the way of a target, an array or a group."""
    target = tmp_path / "y"
    if kind == "same" and what == "array":
        create(target, some((3,), "f4"), (2,))
    elif kind in ("same", "other kind"):
        zarr.create_group(target) if (kind == "same") == (what == "group") else create(
            target, some((3,), "f4"), (2,), zarr_format=2
        )
    elif kind == "clipped":
        clip_zarr(tmp_path / what, target, 3.0)
    elif kind == "folder":
        (target / "holiday").mkdir(parents=True)
    elif kind == "file":
        target.write_text("mine")
    elif kind == "dangling":
        target.symlink_to("nowhere")
    elif kind == "link":
        target.symlink_to(create(tmp_path / "linked", some((3,), "f4"), (2,)))
    return target


KINDS = ["same", "clipped", "other kind", "folder", "file", "dangling", "link"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["array", "group"])
@pytest.mark.parametrize("command", ["run", "plan"])
def test_overwriting_is_proposed_where_it_works(tmp_path, kind, what, command):
    create(tmp_path / "array", some((5, 6), "f4"), (2, 4))
    zarr.create_group(tmp_path / "group").create_array("a", data=some((5, 6), "f4"))
    target = make_taken(tmp_path, kind, what)
    done = run(command, tmp_path / what, target, *LIMIT)
    assert_fails(done, 5, "exists; remove it or choose another path")
    works = run("run", tmp_path / what, target, *LIMIT, "--overwrite").exit_code == 0
    assert works == (kind in ("same", "clipped"))
    assert works == ("--overwrite" in done.stderr)


def test_overwriting_a_mount_point_is_not_proposed(source, tmp_path):
    with mounted(tmp_path, "size=64k") as point:
        assert_fails(run("run", source, point, *LIMIT), 3, "mount point")
        shutil.copytree(source, point, dirs_exist_ok=True)
        done = run("run", source, point, *LIMIT)
        assert_fails(done, 5, "exists; remove it or choose another path")
        assert "--overwrite" not in done.stderr


def test_what_a_run_made_is_not_overwritten_by_another_kind(source, tmp_path):
    zarr.create_group(tmp_path / "group").create_array("a", data=some((5, 6), "f4"))
    clip_zarr(tmp_path / "group", tmp_path / "y", 1.0)
    done = run("run", source, tmp_path / "y", *LIMIT)
    assert_fails(done, 5, "exists; remove it or choose another path")
    assert "--overwrite" not in done.stderr


def test_norms_where_something_is_are_not_overwritten(source, tmp_path):
    create(tmp_path / "norms", some((5, 6), "f4"), (2, 4))
    done = run("stats", source, "--save-norms", tmp_path / "norms")
    assert_fails(done, 5, tmp_path / "norms", "remove it or choose another path")
    assert "overwrite" not in done.stderr


def test_an_empty_folder_is_a_place_for_norms(source, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run("stats", source, "--save-norms", tmp_path / "empty").exit_code == 0
    assert bits(read(tmp_path / "empty")) == bits(norm(read(source)))


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_an_empty_folder_is_a_place_for_a_target(source, tmp_path, options):
    target = tmp_path / "empty"
    target.mkdir()
    assert run("plan", source, target, *LIMIT, *options).exit_code == 0
    assert list(target.iterdir()) == []
    assert_fails(run("verify", target), 3, "is an empty folder", target)
    assert run("run", source, target, *LIMIT, *options).exit_code == 0
    assert bits(read(target)) == bits(clip_by_norm(read(source), 1.0))
    assert verify_zarr(target, source).slices == 1


@pytest.mark.parametrize("inside", [".hidden", "a", "link"])
def test_a_folder_that_holds_anything_is_none(source, tmp_path, inside):
    target = tmp_path / "y"
    target.mkdir()
    (target / inside).symlink_to("nowhere") if inside == "link" else (target / inside).touch()
    before = finished(tmp_path)
    assert_fails(run("run", source, target, *LIMIT), 5, "exists")
    assert_fails(run("run", source, target, *LIMIT, "--overwrite"), 3, "no zarr array")
    (tmp_path / "to-empty").symlink_to(tmp_path)
    assert_fails(run("run", source, tmp_path / "to-empty", *LIMIT), 5, "exists")
    (tmp_path / "to-empty").unlink()
    assert finished(tmp_path) == before


@pytest.mark.parametrize(
    ("memory", "number"),
    [
        ("512", "512"), ("1", "1"), (" 64 ", "64"), ("1048575", "1048575"), ("512.0", "512"),
        ("1e2", "100"), ("4 096", "4096"), ("2_048", "2048"), ("1.5", "1.5"), ("5.12E+2\t", "512"),
    ],
)  # fmt: skip
def test_memory_without_a_unit(source, tmp_path, memory, number):
    done = run("run", source, tmp_path / "y", *LIMIT, "--memory", memory)
    assert_fails(done, 3, "no unit", "taken as bytes", f"'{number}MiB'")
    # a number is bytes, and so is what has a unit
    for small in (int(float(number)), f"{number}B"):
        with pytest.raises(ValueError, match="too small"):
            clip_zarr(source, tmp_path / "y", 1.0, memory=small)
    assert run("run", source, tmp_path / "y", *LIMIT, "--memory", 2**28).exit_code == 0


@pytest.mark.parametrize("limit", ["P99", "99%", "1,5", "p99%", "p101", "p9,5", "1.5x", "--1", "½"])
def test_a_limit_that_is_no_number_names_both_forms(source, tmp_path, limit):
    done = run("run", source, tmp_path / "y", f"--clip-norm={limit}")
    code = 3 if limit[0] == "p" else 2
    assert_fails(done, code, limit, "number", "percentile", "p99")
    assert "P99" not in run("run", "--help").stdout


def test_what_was_never_clipped_is_not_clipped_again(source, tmp_path):
    kept = clip_zarr(source, None, 1e6, in_place=True)
    assert kept.status == "nothing to clip"
    zarr.create_group(tmp_path / "group")
    (tmp_path / "file").touch()
    for name in ("x", "group", "file"):
        done = run("verify", tmp_path / name)
        assert_fails(done, 4, tmp_path / name, "no record of a run", "verify what daskclip run")
        assert "clip it again" not in done.stderr
        with pytest.raises(VerificationError):
            verify_zarr(tmp_path / name)


def test_stores_are_not_told_what_only_arrays_have(tmp_path):
    integers = create(tmp_path / "integers", np.ones((5, 6), "i4"), (2, 4))
    parts = create(tmp_path / "complex", np.ones((5, 6), "c8"), (2, 4))
    done = run("run", integers, tmp_path / "y", *LIMIT)
    assert_fails(done, 3, "int32", "store a copy as one of", "float32")
    assert "astype" not in done.stderr
    done = run("run", parts, tmp_path / "y", *LIMIT, "--ord", 1)
    assert_fails(done, 3, "complex64")
    assert ".real" not in done.stderr
    with pytest.raises(DTypeError, match=r"astype\('float32'\)"):
        clip_by_norm(np.ones(3, "i4"), 1.0)


@pytest.mark.parametrize("name", ["y", "with a space", "it's", "$HOME", "-y"])
def test_a_command_in_a_message_can_be_run(source, tmp_path, name, monkeypatch):
    target = tmp_path / name
    (source / "c/1/0").write_bytes(b"broken")
    assert run("run", source, target, *LIMIT).exit_code == 1
    done = run("run", source, target, "--clip-norm", 2)
    assert_fails(done, 5, "unfinished run", "discard it with: daskclip discard")
    assert run(*remedy_of(done)).stdout == "discarded\n"
    assert_fails(run("run", source, target, "--norms", target, *LIMIT), 3, "save them with")


def test_norms_that_cannot_be_used_name_a_command_that_works(source, tmp_path):
    norms = tmp_path / "the norms"
    missing = run("run", source, tmp_path / "y", *LIMIT, "--norms", norms)
    assert_fails(missing, 3, "do not exist")
    assert run(*remedy_of(missing)).exit_code == 0
    zarr.open_array(source)[0, 0] = 5
    changed = run("run", source, tmp_path / "y", *LIMIT, "--norms", norms)
    assert_fails(changed, 3, "save them again with", "after removing the old ones")
    assert stats_zarr(source).slices == 1
    assert remedy_of(changed) == remedy_of(missing)
