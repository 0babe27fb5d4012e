"""Clip the gradients of a training run as a group: each by its own norm, or all by one.

It shows how to clip a Zarr group: the gradients of every parameter of a small network, in 20 steps
over the digits of scikit-learn, are 80 arrays of four shapes. One run clips them all.
"""

import tempfile
from pathlib import Path

import numpy as np
import zarr
from scipy.special import softmax
from sklearn.datasets import load_digits

import daskclip

NAMES = ["hidden/bias", "hidden/kernel", "out/bias", "out/kernel"]


def gradients(x, y, parameters):
    """Gradients of the mean cross-entropy, in the order of NAMES."""
    b1, w1, b2, w2 = parameters
    hidden = np.maximum(x @ w1 + b1, 0)
    error2 = (softmax(hidden @ w2 + b2, axis=1) - np.eye(10, dtype=x.dtype)[y]) / len(x)
    error1 = error2 @ w2.T * (hidden > 0)
    return [error1.sum(axis=0), x.T @ error1, error2.sum(axis=0), hidden.T @ error2]


def main(tmp):
    digits, random = load_digits(), np.random.default_rng(0)
    x, y = np.float32(digits.data / 16), digits.target
    shapes = [(32,), (64, 32), (10,), (32, 10)]
    parameters = [random.normal(0, 0.1, shape).astype("f4") for shape in shapes]
    group, steps = zarr.create_group(Path(tmp) / "run.zarr"), []
    for step in range(20):
        batch = random.integers(0, len(x), 64)
        steps.append(gradients(x[batch], y[batch], parameters))
        for name, g in zip(NAMES, steps[-1], strict=True):
            group.create_array(f"{step:02}/{name}", data=g, chunks=g.shape)
        clipped, _ = daskclip.clip_by_global_norm(steps[-1], 1.0)
        parameters = [p - 0.5 * g for p, g in zip(parameters, clipped, strict=True)]

    # daskclip run run.zarr own.zarr --clip-norm 0.3
    print(report := daskclip.clip_zarr(Path(tmp) / "run.zarr", Path(tmp) / "own.zarr", 0.3))
    own = zarr.open_group(Path(tmp) / "own.zarr", mode="r")
    for i, step in enumerate(steps):
        # daskclip run run.zarr/00 step.zarr --clip-norm 1 --global
        target = Path(tmp) / f"step-{i}.zarr"
        daskclip.clip_zarr(Path(tmp) / "run.zarr" / f"{i:02}", target, 1.0, global_norm=True)
        whole, _ = daskclip.clip_by_global_norm(step, 1.0)
        for name, g, w in zip(NAMES, step, whole, strict=True):
            each = daskclip.clip_by_norm(g, 0.3)
            assert own[f"{i:02}/{name}"][...].tobytes() == each.tobytes()
            assert zarr.open_group(target, mode="r")[name][...].tobytes() == w.tobytes()
    assert (report.arrays, report.slices) == (80, 80)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
