"""Bytes that change: in the source before and during a run, in what was written, and bombs.

Damaged chunks are decoded by a process of their own, which is this file run as a script: a decoder
that reads outside of its memory must not take the other tests with it.
"""

import asyncio
import bz2
import json
import lzma
import math
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

import numcodecs
import numpy as np
import pytest
from reference import bits
from stores import FORMATS, create, read, some, stored
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.codecs import numcodecs as bundled
from zarr.core.sync import sync

from daskclip import clip_by_norm, clip_zarr, verify_zarr
from daskclip.engine import request as prepare
from daskclip.engine.run_record import discard, plan_from_json
from daskclip.errors import DaskClipError, StorageError, TargetExistsError, VerificationError
from daskclip.plan import array as plan
from daskclip.storage import regions
from daskclip.storage.hierarchy import DOCUMENTS, at_folder
from daskclip.target import journal

SIZES = {"BLOCK": 2048, "FIXED": 0, "SCRATCH": 0, "SLICE": 0, "WINDOW": 1}
# sums that weigh less than the elements, as those of large chunks do
STATE = {2: 1, 4: 1, 8: 1}
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
"""Chains that tell every change by a checksum."""
MUTATIONS, SOME = 40, 6


def damaged(path, generator, n):
    """Bytes of a file with one to three bits flipped, or every third time cut off."""
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
    """Keys of all files of chunks."""
    return [k for k, v in stored(array).items() if v is not None and not k.startswith((".z", "z"))]


def refused(source, target, key, clip_norm):
    """Whether the run fails; then it says why on one line, by the chunk, and makes no target."""
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
    """Wait for what zarr has under way."""
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


def before_the_run(source, key, data, n):
    """What a run does with a source with a damaged chunk."""
    values, target = read(source), source.with_name("y")
    (source / key).write_bytes(data)
    now = stored(source)
    limit = (1.0, 1e9)[n % 2]
    failed = refused(source, target, key, limit)
    assert stored(source) == now
    if failed:
        discard(target)
        # zarr itself dies of some chunks of blosc that are refused
        if "blosc" not in source.parent.name:
            try:
                decoded = read(source)
            except Exception:
                sync(others())  # it goes on with the other chunks
                return "refused"
            # zarr takes an empty shard for one that is not stored
            assert bits(decoded) == bits(values) or not data, "refused, and zarr reads other values"
        return "refused"
    x = read(source)  # what did not kill the run does not kill this
    assert bits(read(target)) == bits(clip_by_norm(x, limit))
    shutil.rmtree(target)
    return "unchanged" if bits(x) == bits(values) else "changed"


def between_the_passes(source, key, data, n):
    """What a run does when a chunk is damaged after it was read once."""
    target, changed = source.with_name("y"), []
    original, seen = journal.Journal.append, set()

    def append(self, entry):
        original(self, entry)
        seen.update(getattr(entry, "source", None) or ())
        if (
            not changed
            and len(seen) == plan_from_json(journal.header(self._folder / "journal")).blocks
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
        assert refused(source, target, key, (1.0, 1e9)[n // 4 % 2])
    assert changed
    assert stored(source) == now
    if (source.parent / ".y.daskclip").exists():
        with pytest.raises(TargetExistsError, match=rf"chunk {re.escape(key)}\) changed since"):
            clip_zarr(source, target, (1.0, 1e9)[n // 4 % 2], memory=TWO_PASSES)
        discard(target)
    return "refused"


def damage(chain, folder, situation, number):
    """Damage a source over and over; prints a JSON line each time."""
    for name, size in (SIZES | {"WINDOW": 8}).items():
        setattr(plan, name, size)
    prepare.STATE = STATE
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
    """How often there was what outcome, in a process that must not die."""
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


@pytest.fixture
def small(monkeypatch):
    """Blocks of a few small chunks, so that small arrays take several slabs and windows."""
    for name, size in SIZES.items():
        monkeypatch.setattr(plan, name, size)
    monkeypatch.setattr(prepare, "STATE", STATE)


LAYOUTS = {name: FORMATS[name] for name in FORMATS} | {
    "shards": {"zarr_format": 3, "shards": (8, 64)}
}


def written(folder, layout, axes=None, name="y", **options):
    """A source ``x`` and an array that was made from it."""
    if not (folder / "x").exists():
        attributes = {"unit": "K", "scale": [1, 0.5]}
        create(folder / "x", some(SHAPE, "f4"), CHUNKS, **LAYOUTS[layout], attributes=attributes)
    clip_zarr(folder / "x", folder / name, 1.0, axes, **options)
    return folder / name


def found(target, *words, source=None):
    """`verify_zarr` says on one line that the array is not what was written."""
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
    """Ends a run at a counted line of its journal."""


def stopped(folder, monkeypatch, axes, lines):
    """A run that ends once it has written so many lines that name blocks of the target.

    Returns the folder it writes to, and the keys of what it is done with.
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
    array, blocks = at_folder(staged).arrays[""], plan_from_json(run).plans[""]
    each = blocks.blocks // blocks.slabs
    cells = [divmod(int(number), each) for entry in done for number in entry]
    keys = [key for cell in cells for key in regions.keys(array, blocks.region(*cell))]
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


def remove(y, key):
    (y / key).unlink()


def link(y, key):
    (y / key).rename(y.parent / "elsewhere")
    (y / key).symlink_to(y.parent / "elsewhere")


def dangle(y, key):
    (y / key).unlink()
    (y / key).symlink_to(y.parent / "nowhere")


def folder(y, key):
    (y / key).unlink()
    (y / key).mkdir()


def pipe(y, key):
    (y / key).unlink()
    os.mkfifo(y / key)


def empty(y, key):
    (y / key).write_bytes(b"")


def swap(y, key):
    (y / key).rename(y / "part")
    other = chunks_of(y)[0]
    (y / other).rename(y / key)
    (y / "part").rename(y / other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", [remove, link, dangle, folder, pipe, empty, swap])
def test_a_changed_chunk_is_found(tmp_path, layout, change):
    y = written(tmp_path, layout)
    change(y, CHUNK[layout])
    words = () if change is swap else (CHUNK[layout],)
    found(y, *words)


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
        # of folders in the place of a chunk, it is the folder that is told
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
    told = [n for n, line in enumerate(lines) if b'"target":{"' in line]
    assert told
    for n in (0, *told, len(lines) - 1):
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


# --- bombs ---------------------------------------------------------------------------------------

SIZE = 2**31 - 2**22  # the header of blosc holds no more


def gzip_bomb(size):
    packer = zlib.compressobj(9, wbits=31)
    part = packer.compress(bytes(2**20)) + packer.flush()
    return part * (size >> 20)


def zlib_bomb(size):
    packer = zlib.compressobj(9)
    first, again = (
        packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    checksum = size % 65521 << 16 | 1  # Adler-32 of zeros
    return first + again * ((size >> 20) - 1) + b"\3\0" + checksum.to_bytes(4, "big")


def bz2_bomb(size):
    return bz2.compress(bytes(2**22)) * (size >> 22)


def lzma_bomb(size):
    return lzma.compress(bytes(2**22)) * (size >> 22)


def zstd_bomb(size, *, declared=True):
    """Frame of blocks that repeat a byte, 128 KiB each (RFC 8878, section 3.1.1.2)."""
    flags, width = (0xC0, 8) if declared else (0, 0)
    block = (2**17 << 3 | 2).to_bytes(3, "little") + b"\0"
    last = (2**17 << 3 | 3).to_bytes(3, "little") + b"\0"
    head = b"\x28\xb5\x2f\xfd" + bytes([flags, 0x38]) + size.to_bytes(8, "little")[:width]
    return head + block * ((size >> 17) - 1) + last


def zstd_stream(size):
    return zstd_bomb(size, declared=False)


def zstd_second_frame(size):
    return numcodecs.Zstd().encode(bytes(64)) + zstd_stream(size - 2**17)


def zstd_after_a_skipped_frame(size):
    return b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + bytes(4) + zstd_bomb(size)


def lz4_bomb(size):
    # a literal, a copy of it of 4 + 15 + 255 * n + rest bytes, and five literals
    n, rest = divmod(size - 6 - 19, 255)
    return size.to_bytes(4, "little") + b"\x1f\0\1\0" + b"\xff" * n + bytes([rest, 0x50, *bytes(5)])


def blosc_bomb(size):
    """One compressed block that every block of the chunk points to."""
    step = 2**18
    one = numcodecs.blosc.compress(bytes(step), b"lz4", 1, 0, step)
    starts = (16 + 4 * (size // step)).to_bytes(4, "little") * (size // step)
    sizes = (size, step, len(one) - 4 + len(starts))
    return one[:4] + b"".join(n.to_bytes(4, "little") for n in sizes) + starts + one[20:]


# name: bomb, its codec in formats 3 and 2
BOMBS = {
    "gzip": (gzip_bomb, GzipCodec, numcodecs.GZip),
    "zlib": (zlib_bomb, bundled.Zlib, numcodecs.Zlib),
    "bz2": (bz2_bomb, bundled.BZ2, numcodecs.BZ2),
    "lzma": (lzma_bomb, bundled.LZMA, numcodecs.LZMA),
    "zstd": (zstd_bomb, ZstdCodec, numcodecs.Zstd),
    "zstd of no size": (zstd_stream, ZstdCodec, numcodecs.Zstd),
    "zstd of two frames": (zstd_second_frame, ZstdCodec, numcodecs.Zstd),
    "zstd skipped": (zstd_after_a_skipped_frame, ZstdCodec, numcodecs.Zstd),
    "lz4": (lz4_bomb, bundled.LZ4, numcodecs.LZ4),
    "blosc": (blosc_bomb, BloscCodec, numcodecs.Blosc),
}


def in_gzip(bomb):
    packer = zlib.compressobj(9, wbits=31)
    return packer.compress(bomb) + packer.flush()


def checked(data):
    return bytes(numcodecs.CRC32C(location="end").encode(data))


def in_shard(bomb):
    """A shard of two chunks, of which the second one is not stored."""
    index = np.array([0, len(bomb), 2**64 - 1, 2**64 - 1], "<u8")
    return bomb + checked(index.tobytes())


@pytest.mark.parametrize("name", BOMBS)
def test_a_smaller_bomb_is_what_its_codec_decodes(name):
    make, _, codec = BOMBS[name]
    size = 2**23
    assert len(make(size)) < size / 100
    decoded = np.frombuffer(codec().decode(make(size)), "u1")
    assert abs(decoded.size - size) <= 2**17
    assert not decoded.any()


def refuse_bombs(folder):
    """Clip every source in a folder with 1.5 GB above the imports; prints each outcome."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**29,) * 2)
    for source in sorted(Path(folder).iterdir()):
        try:
            outcome = clip_zarr(source, source.with_name(f"{source.name} clipped"), 1.0).status
        except StorageError as error:
            outcome = str(error)
        print(json.dumps([source.name, outcome]))


# zarr says so for every codec of numcodecs in format 3
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
def test_bombs_are_refused_by_their_chunk(tmp_path):
    values, folder, wanted = some((4, 8), "f4"), tmp_path / "bombs", {}

    def add(name, key, bomb, **options):
        assert len(bomb) < 10**7
        source = create(folder / name, values, (2, 8), **options)
        assert (source / key).is_file()
        (source / key).write_bytes(bomb)
        wanted[name] = rf"failed at chunk {key}: ValueError: it decodes to \d+ bytes or more"

    for name, (make, three, two) in BOMBS.items():
        bomb = make(SIZE)
        add(f"{name} 3", "c/1/0", bomb, compressors=three())
        add(f"{name} 2", "1.0", bomb, compressors=two(), zarr_format=2)
    add("nested", "c/1/0", in_gzip(gzip_bomb(SIZE)), compressors=[GzipCodec(), GzipCodec()])
    add("checked", "c/1/0", checked(zstd_stream(SIZE)), compressors=[ZstdCodec(), Crc32cCodec()])
    add("shard", "c/0/0", in_shard(zstd_stream(SIZE)), compressors=ZstdCodec(), shards=(4, 8))
    create(folder / "sound", values, (2, 8))
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-200:] + done.stderr
    outcomes = dict(map(json.loads, done.stdout.splitlines()))
    assert outcomes.pop("sound") == "clipped"
    assert outcomes.keys() == wanted.keys()
    for name, outcome in outcomes.items():
        assert re.search(wanted[name], outcome), (name, outcome)
        assert "\n" not in outcome


if __name__ == "__main__":
    if len(sys.argv) == 2:
        refuse_bombs(sys.argv[1])
    else:
        damage(*sys.argv[1:4], int(sys.argv[4]))
