"""Changed bytes: in the source before and during a run, and in what was written.

This file, run as a script, decodes damaged chunks in a separate process, because a decoder that
reads outside its buffer must not crash the other tests.
"""

import asyncio
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numcodecs
import numpy as np
import pytest
import zarr
from damage import dangle, empty, folder, link, pipe, remove
from reference import bits
from sizes import SMALL, use
from stores import FORMATS, create, read, some, stored
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.core.sync import sync

from daskclip import clip_by_norm, clip_zarr, verify_zarr
from daskclip.engine.run_record import discard, plan_from_json
from daskclip.errors import DaskClipError, StorageError, TargetExistsError, VerificationError
from daskclip.storage import Hierarchy
from daskclip.storage.files import DOCUMENTS
from daskclip.target import journal

SIZES = SMALL | {"block_nbytes": 2048, "window_blocks": 1}
# sums that weigh less than the elements, as those of large chunks do
TWO_PASSES = 12 * 1024
SHAPE, CHUNKS = (48, 64), (8, 32)
CHAINS = {
    "raw": {"compressors": None},
    "zstd": {"compressors": ZstdCodec(level=3)},
    "zstd checked": {"compressors": [ZstdCodec(checksum=True), Crc32cCodec()]},
    "gzip": {"compressors": GzipCodec()},
    "blosc lz4": {"compressors": BloscCodec(cname="lz4", shuffle="noshuffle")},
    "blosc zstd": {"compressors": BloscCodec(cname="zstd", shuffle="shuffle", typesize=4)},
    "format 2 blosc": {"zarr_format": 2, "compressors": numcodecs.Blosc("lz4hc", shuffle=2)},
    "format 2 zlib": {
        "zarr_format": 2,
        "filters": [numcodecs.Shuffle(4)],
        "compressors": numcodecs.Zlib(),
    },
    "shards": {"shards": (8, 64), "compressors": ZstdCodec()},
}
CHECKED = {"zstd checked", "gzip", "format 2 zlib"}
"""Chains that detect every change by a checksum."""
MUTATIONS, SOME = 40, 6


def damaged(path, generator, n):
    """Bytes of a file with one to three bits flipped; every third time truncated."""
    data = bytearray(path.read_bytes())
    if n % 3 == 2:
        return bytes(data[: 0 if n == 2 else generator.randrange(len(data))])
    for bit in generator.sample(range(8 * len(data)), generator.randint(1, 3)):
        data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def flipped(path, generator):
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    bit = generator.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def chunks_of(array):
    """Keys of all chunk files."""
    return [k for k, v in stored(array).items() if v is not None and not k.startswith((".z", "z"))]


def fails_at_chunk(source, target, key, clip_norm):
    """Whether the run fails; then with one line that names the chunk, and without a target."""
    try:
        clip_zarr(source, target, clip_norm, memory=TWO_PASSES)
    except DaskClipError as error:
        caught = error
    else:
        return False
    text = str(caught)
    assert "\n" not in text
    assert re.search(rf"chunk {re.escape(key)}[:)]", text), text
    assert caught.exit_code in (1, 3), text
    assert not target.exists()
    return True


async def others():
    """Wait for the operations that zarr is still running."""
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


def before_the_run(source, key, data, n):
    """Outcome of a run whose source has a damaged chunk."""
    values, target = read(source), source.with_name("y")
    (source / key).write_bytes(data)
    now = stored(source)
    limit = (1.0, 1e9)[n % 2]
    failed = fails_at_chunk(source, target, key, limit)
    assert stored(source) == now
    if failed:
        discard(target)
        # zarr itself crashes on some Blosc chunks that daskclip refuses
        if "blosc" not in source.parent.name:
            try:
                decoded = read(source)
            except Exception:
                sync(others())  # it goes on with the other chunks
                return "refused"
            # zarr treats an empty shard as not stored
            assert bits(decoded) == bits(values) or not data, "refused, and zarr reads other values"
        return "refused"
    x = read(source)  # safe: the run has decoded the same bytes
    assert bits(read(target)) == bits(clip_by_norm(x, limit))
    shutil.rmtree(target)
    return "unchanged" if bits(x) == bits(values) else "changed"


def between_the_passes(source, key, data, n):
    """Outcome of a run when a chunk is damaged between the passes."""
    target, changed = source.with_name("y"), []
    original, seen = journal.Journal.append, set()

    def append(self, entry):
        original(self, entry)
        seen.update(getattr(entry, "source", None) or ())
        if (
            not changed
            and len(seen) == plan_from_json(journal.header(self.arrays.place / "journal")).blocks
        ):
            changed.append(None)
            before = (source / key).stat()
            part = source / key if n % 2 else source / f"{key}.new"
            part.write_bytes(data)
            if n // 2 % 2:
                os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
            os.replace(part, source / key)

    now = stored(source) | {key: data}
    with mock.patch.object(journal.Journal, "append", append):
        assert fails_at_chunk(source, target, key, (1.0, 1e9)[n // 4 % 2])
    assert changed
    assert stored(source) == now
    if (source.parent / ".y.daskclip").exists():
        with pytest.raises(TargetExistsError, match=rf"chunk {re.escape(key)}\) changed since"):
            clip_zarr(source, target, (1.0, 1e9)[n // 4 % 2], memory=TWO_PASSES)
        discard(target)
    return "refused"


def damage(chain, folder, situation, number):
    """Damage a source repeatedly, and print a JSON line for each outcome."""
    use(**SIZES | {"window_blocks": 8})
    generator = random.Random(f"{chain} {situation}")
    values = np.repeat(some((SHAPE[0], SHAPE[1] // 4), "f4"), 4, axis=1)
    source = create(Path(folder) / chain / "x", values, CHUNKS, **CHAINS[chain])
    pristine, keys = stored(source), chunks_of(source)
    for n in range(number):
        key = generator.choice(keys)
        data = damaged(source / key, generator, n)
        print(json.dumps([n, key, len(data)]), flush=True)
        outcome = globals()[situation](source, key, data, n)
        print(json.dumps(outcome), flush=True)
        (source / key).write_bytes(pristine[key])


def outcomes(chain, folder, situation, number):
    """Count the outcomes of `damage` in a process that must survive."""
    command = [sys.executable, __file__, chain, str(folder), situation, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-200:] + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 * number
    return Counter(line for line in lines if isinstance(line, str))


@pytest.mark.parametrize(
    ("chain", "number"),
    [
        *((chain, SOME) for chain in ("blosc lz4", "shards")),
        *(pytest.param(chain, MUTATIONS, marks=pytest.mark.slow) for chain in CHAINS),
    ],
)
def test_damage_before_the_run_is_refused_or_read_as_zarr_reads_it(tmp_path, chain, number):
    found = outcomes(chain, tmp_path, "before_the_run", number)
    assert found["refused"] >= number // 3
    if chain == "raw":
        assert found["changed"] == number - number // 3
    if chain in CHECKED:
        assert not found["changed"]


@pytest.mark.parametrize(
    ("chain", "number"),
    [
        ("format 2 blosc", 8),
        *(pytest.param(chain, MUTATIONS, marks=pytest.mark.slow) for chain in CHAINS),
    ],
)
def test_damage_between_the_passes_is_refused(tmp_path, chain, number):
    assert outcomes(chain, tmp_path, "between_the_passes", number) == {"refused": number}


# --- what was written ----------------------------------------------------------------------------


LAYOUTS = {name: FORMATS[name] for name in FORMATS} | {
    "shards": {"zarr_format": 3, "shards": (8, 64)}
}


def written(folder, layout, axes=None, name="y", **options):
    """Clip the source ``x``, created if needed, and return the path of the result."""
    if not (folder / "x").exists():
        attributes = {"unit": "K", "scale": [1, 0.5]}
        create(folder / "x", some(SHAPE, "f4"), CHUNKS, **LAYOUTS[layout], attributes=attributes)
    clip_zarr(folder / "x", folder / name, 1.0, axes, **options)
    return folder / name


def found(target, *words, source=None):
    """Check that `verify_zarr` reports, on one line, an array that was changed."""
    with pytest.raises(VerificationError) as caught:
        verify_zarr(target, source)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("number", [10, pytest.param(70, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_a_published_array_is_found(tmp_path, layout, number):
    y = written(tmp_path, layout, memory=TWO_PASSES)
    verify_zarr(y, tmp_path / "x")
    generator = random.Random(layout)
    keys = chunks_of(y)
    for n in range(number):
        path = y / generator.choice(keys)
        status, data = path.stat(), path.read_bytes()
        flipped(path, generator)
        if n % 2:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        found(y, f"(chunk {path.relative_to(y)})", "is not what was written")
        path.write_bytes(data)
    verify_zarr(y)


class Stop(Exception):
    """Stops a run at some line of its journal."""


def stopped(folder, monkeypatch, axes, lines):
    """Stop a run once its journal has that many lines with written blocks.

    Returns the staging folder, and the keys of the chunks that are journalled as written.
    """
    original, done = journal.Journal.append, []

    def append(self, entry):
        original(self, entry)
        if getattr(entry, "target", None) is not None:
            done.append(entry.target)
        if len(done) == lines:
            raise Stop

    monkeypatch.setattr(journal.Journal, "append", append)
    with pytest.raises(Stop):
        clip_zarr(folder / "x", folder / "y", 1.0, axes, memory=TWO_PASSES)
    monkeypatch.setattr(journal.Journal, "append", original)
    run = journal.header(folder / ".y.daskclip" / "journal")
    staged = folder / ".y.daskclip" / run.id
    array, blocks = Hierarchy.open(staged).arrays[""], plan_from_json(run).plans[""]
    each = blocks.blocks // blocks.slabs
    cells = [divmod(int(number), each) for entry in done for number in entry]
    keys = [key for cell in cells for key in array.keys(blocks.region(*cell))]
    return staged, keys


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", [None, 1])
@pytest.mark.parametrize("number", [3, pytest.param(34, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_a_staged_array_is_found(tmp_path, monkeypatch, layout, axes, number):
    y = written(tmp_path, layout)
    shutil.rmtree(y)
    generator = random.Random(layout)
    for _ in range(number):
        staged, keys = stopped(tmp_path, monkeypatch, axes, generator.randint(1, 2))
        key = generator.choice(keys)
        flipped(staged / key, generator)
        data = (staged / key).read_bytes()
        report = clip_zarr(tmp_path / "x", y, 1.0, axes, memory=TWO_PASSES)
        assert report.passes == (2 if axes is None else 1)
        assert report.bytes_written < 4 * math.prod(SHAPE)
        assert (y / key).read_bytes() == data
        found(y, f"(chunk {key})", "is not what was written")
        shutil.rmtree(y)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_whose_staged_metadata_is_damaged_can_be_discarded(tmp_path, monkeypatch, layout):
    y = written(tmp_path, layout)
    shutil.rmtree(y)
    staged, _ = stopped(tmp_path, monkeypatch, None, 1)
    document = staged / (".zarray" if layout == "format 2" else "zarr.json")
    document.write_bytes(document.read_bytes()[:-3])
    with pytest.raises(StorageError, match=r"is not what it was.*discard") as caught:
        clip_zarr(tmp_path / "x", y, 1.0, memory=TWO_PASSES)
    assert "\n" not in str(caught.value)
    assert discard(y)
    verify_zarr(written(tmp_path, layout), tmp_path / "x")


CHUNK = {"format 3": "c/2/1", "format 2": "2.1", "shards": "c/1/0"}


def swap(y, key):
    (y / key).rename(y / "part")
    other = chunks_of(y)[0]
    (y / other).rename(y / key)
    (y / "part").rename(y / other)


def write_over(y, key):
    """Store other values, whose norms are within the limit, in the place of a chunk or shard."""
    array = zarr.open_array(y)
    unit = array.shards or array.chunks
    numbers = [int(i) for i in re.findall(r"\d+", key)[-2:]]
    box = tuple(slice(i * n, (i + 1) * n) for i, n in zip(numbers, unit, strict=True))
    array[box] = array[box] / 2


def flip(y, key):
    flipped(y / key, random.Random(key))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", [remove, link, dangle, folder, pipe, empty, swap])
def test_a_changed_chunk_is_found(tmp_path, layout, change):
    y = written(tmp_path, layout)
    change(y, CHUNK[layout])
    words = () if change is swap else (CHUNK[layout],)
    found(y, *words)


CHECKSUMS = [
    *(kind() for kind in (numcodecs.CRC32C, numcodecs.Adler32, numcodecs.Fletcher32)),
    *(numcodecs.CRC32(location=end) for end in ("start", "end")),
    numcodecs.JenkinsLookup3(),
]


def layout_with_checksums(generator):
    """Layout of a random chain of codecs, of which the last ones are checksums."""
    if generator.randrange(2):
        checksums = generator.choices(CHECKSUMS, k=generator.randint(1, 3))
        first = generator.choice([[], [numcodecs.Zstd()], [numcodecs.Shuffle(4)]])
        filters = [*first, *checksums[:-1]]
        return {"zarr_format": 2, "filters": filters, "compressors": checksums[-1]}
    first = generator.choice([[], [ZstdCodec(checksum=True)], [GzipCodec()]])
    compressors = first + generator.randint(1, 2) * [Crc32cCodec()]
    shards = generator.choice([{}, {"shards": (16, 64)}])
    return {"zarr_format": 3, "compressors": compressors} | shards


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
def test_changes_behind_checksums_of_codecs_are_found(tmp_path, seed):
    generator = random.Random(seed)
    layout = layout_with_checksums(generator)
    create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS, **layout)
    for limit in (1e9, 1.0):  # copied as they are, and encoded again
        clip_zarr(tmp_path / "x", tmp_path / "y", limit)
        verify_zarr(tmp_path / "y")
        key = generator.choice(chunks_of(tmp_path / "y")[1:])
        for change in (swap, write_over, flip):
            shutil.copytree(tmp_path / "y", tmp_path / "changed")
            change(tmp_path / "changed", key)
            found(tmp_path / "changed", "is not what was written")
            shutil.rmtree(tmp_path / "changed")
        shutil.rmtree(tmp_path / "y")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_files_are_found(tmp_path, layout):
    y = written(tmp_path, layout)
    prefix, separator = ("", ".") if layout == "format 2" else ("c/", "/")
    for name in (
        *("stray", "c/stray", "99/9", "0", "0/0/0/0"),
        *(f"{prefix}{key.replace('/', separator)}" for key in ("99/0", "0/9", "0/0/0", "00/0")),
        *(f"{CHUNK[layout]}.part", f"{CHUNK[layout]}.0123.partial", "c/0/0/zarr.json"),
    ):
        path = y / name
        made = [p for p in path.parents if not p.exists()]
        if any(p.is_file() for p in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"stray")
        # where the stray file made new folders, the message names the folder
        found(y, *([name] if not made else []))
        path.unlink()
        for parent in made:
            parent.rmdir()
    verify_zarr(y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_changed_metadata_is_found(tmp_path, layout):
    y = written(tmp_path, layout)
    documents = [p for p in y.iterdir() if p.name in DOCUMENTS]
    assert documents
    generator = random.Random(layout)
    for document in documents:
        data = document.read_bytes()
        for at in range(0, len(data), 3):
            changed = bytearray(data)
            changed[at] ^= 1 << generator.randrange(8)
            document.write_bytes(changed)
            found(y)
        document.unlink()
        found(y)
        document.symlink_to(tmp_path / "x" / document.name)
        found(y, "symbolic link")
        document.unlink()
        document.write_bytes(data)
    verify_zarr(y)


def test_every_flipped_byte_of_the_record_is_found(tmp_path):
    y = written(tmp_path, "format 3")
    record = y / ".daskclip"
    data = record.read_bytes()
    generator = random.Random(0)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << generator.randrange(8)
        record.write_bytes(changed)
        found(y, "record")
    for length in (0, 1, *(generator.randrange(len(data)) for _ in range(50))):
        record.write_bytes(data[:length])
        found(y, "record")
    record.unlink()
    found(y, "record")
    record.write_bytes(data)
    verify_zarr(y)


@pytest.mark.usefixtures("small")
def test_a_line_that_is_lost_from_the_record_is_found(tmp_path):
    y = written(tmp_path, "format 3", 0, memory=TWO_PASSES)
    lines = (y / ".daskclip").read_bytes().splitlines(keepends=True)
    with_blocks = [n for n, line in enumerate(lines) if b'"target":{"' in line]
    assert with_blocks
    for n in (0, *with_blocks, len(lines) - 1):
        (y / ".daskclip").write_bytes(b"".join(lines[:n] + lines[n + 1 :]))
        found(y)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("axes", [None, 1])
@pytest.mark.parametrize("memory", [TWO_PASSES, 2**30])
def test_another_source_is_found(tmp_path, axes, memory):
    y = written(tmp_path, "format 3", axes, memory=memory)
    assert verify_zarr(y, tmp_path / "x").source == str(tmp_path / "x")
    values = some(SHAPE, "f4")
    other = create(tmp_path / "other", some(SHAPE, "f4", seed=1), CHUNKS)
    found(y, str(other), "is not what clipping", source=other)
    # one element, by one step
    values[17, 40] = np.nextafter(values[17, 40], np.float32(np.inf))
    near = create(tmp_path / "near", values, CHUNKS)
    assert bits(clip_by_norm(values, 1.0, axes)) != bits(read(y))
    found(y, str(near), "is not what clipping", source=near)
    for name, odd in {"double": values.astype("f8"), "wide": values[:, :-1]}.items():
        found(y, str(tmp_path / name), source=create(tmp_path / name, odd, CHUNKS))


if __name__ == "__main__":
    damage(*sys.argv[1:4], int(sys.argv[4]))
