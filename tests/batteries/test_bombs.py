"""Chunks that decode to gigabytes are refused by key, before the memory is taken.

This file, run as a script with little memory, decodes them in a separate process.
"""

import bz2
import json
import lzma
import re
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import numcodecs
import numpy as np
import pytest
from stores import create, some
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.codecs import numcodecs as bundled

from daskclip import clip_zarr
from daskclip.errors import StorageError

SIZE = 2**31 - 2**22  # the largest size that a Blosc header can hold


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
    """A shard of two chunks, the second of which is not stored."""
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
    """Clip every source in a folder within 1.5 GB above the imports, and print each outcome."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**29,) * 2)
    for source in sorted(Path(folder).iterdir()):
        try:
            outcome = clip_zarr(source, source.with_name(f"{source.name} clipped"), 1.0).status
        except StorageError as error:
            outcome = str(error)
        print(json.dumps([source.name, outcome]))


# zarr warns of every numcodecs codec in format 3
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
    refuse_bombs(sys.argv[1])
