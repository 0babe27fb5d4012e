"""Flat files: .npy of any version, .safetensors and shards, written by hand."""

import json
import struct

import numpy as np

TENSORS = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32",
    "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "complex64": "C64",
}  # fmt: skip
INDEX = "model.safetensors.index.json"


def npy(path, x, version=(1, 0), **changes):
    """Write a .npy file, with changes to its header; returns the path."""
    fortran = x.flags.f_contiguous and not x.flags.c_contiguous
    header = {"descr": np.lib.format.dtype_to_descr(x.dtype), "fortran_order": fortran}
    text = repr(header | {"shape": x.shape} | changes)
    return npy_of(path, text.encode("utf-8" if version == (3, 0) else "latin-1"), x, version)


def npy_of(path, text, x, version=(1, 0)):
    """Write a .npy file with any header."""
    width = 2 if version == (1, 0) else 4
    text += b" " * (-(9 + width + len(text)) % 64) + b"\n"
    magic = b"\x93NUMPY" + bytes(version) + len(text).to_bytes(width, "little")
    path.write_bytes(magic + text + x.tobytes(order="A"))
    return path


def header_of(arrays, metadata=None):
    """Header of a .safetensors file."""
    header, at = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, x in arrays.items():
        kind = TENSORS.get(x.dtype.name, "F8_E4M3")
        offsets = [at, at + x.nbytes]
        header[name] = {"dtype": kind, "shape": [*x.shape], "data_offsets": offsets}
        at += x.nbytes
    return header


def safetensors(path, arrays, metadata=None):
    """Write a .safetensors file; returns the path."""
    header = json.dumps(header_of(arrays, metadata)).encode()
    return safetensors_of(path, header, arrays)


def safetensors_of(path, header, arrays):
    """Write a .safetensors file with any header."""
    data = b"".join(np.ascontiguousarray(x).tobytes() for x in arrays.values())
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def shards(folder, parts):
    """Write a folder of .safetensors files with their index; returns the folder."""
    folder.mkdir()
    places = {}
    for i, arrays in enumerate(parts):
        name = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        safetensors(folder / name, arrays)
        places |= dict.fromkeys(arrays, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))
    return folder
