"""Cases recorded from TensorFlow 2.21, and their arguments as arrays."""

import json
from pathlib import Path

import numpy as np
from reference import BFLOAT16

DATA = Path(__file__).parents[1] / "data"
CASES = {c["id"]: c for c in json.loads((DATA / "tf_vectors_open.json").read_text())["cases"]}
ARRAYS = np.load(DATA / "tf_vectors_open.npz")
BY_NORM = [k for k, c in CASES.items() if c["func"] == "clip_by_norm"]
BY_GLOBAL_NORM = [k for k, c in CASES.items() if c["func"] == "clip_by_global_norm"]


def array(key, dtype):
    x = ARRAYS[key]
    return x.view(BFLOAT16) if dtype == "bfloat16" else x


def number(value):
    if isinstance(value, list):
        return [number(v) for v in value]
    if isinstance(value, dict):
        return complex(*value["complex"]) if "complex" in value else float.fromhex(value["f"])
    return value


def argument(spec):
    """An argument as the recording gave it; tensors become arrays."""
    kind, value = spec["kind"], number(spec["value"])
    if kind in ("ndarray", "tensor"):
        return np.array(value, spec.get("dtype"))
    if kind == "numpy_scalar":
        return np.dtype(spec["dtype"]).type(value)
    if kind == "range":
        return range(*value)
    return tuple(value) if kind == "tuple" else value
