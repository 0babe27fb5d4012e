"""Take one step of differentially private training: clip each example, add up, add noise.

It shows how to clip by one norm over several arrays, each of which has the examples on its first
axis. No norm may exceed the limit, the scale of the noise: it is checked in rational numbers.
"""

import tempfile
from fractions import Fraction

import numpy as np
import zarr
from scipy.special import softmax
from sklearn.datasets import load_digits

import daskclip

SHAPES = {"b1": (32,), "w1": (64, 32), "b2": (10,), "w2": (32, 10)}
LIMIT, NOISE, BATCH = 1.9, 1.1, 128
TEXT = "{} of {} clipped norms exceed the limit if float32 is clipped by hand, {} by daskclip."


def gradients(x, y, b1, w1, b2, w2):
    """Gradients of the cross-entropy, in the order of SHAPES, a row for each example."""
    hidden = np.maximum(x @ w1 + b1, 0)
    error2 = softmax(hidden @ w2 + b2, axis=1) - np.eye(10, dtype=x.dtype)[y]
    error1 = error2 @ w2.T * (hidden > 0)
    return error1, x[..., None] * error1[:, None], error2, hidden[..., None] * error2[:, None]


def squared_norms(arrays):
    """Square of the norm of each example over all arrays, without rounding."""
    rows = np.concatenate([a.reshape(len(a), -1) for a in arrays], axis=1)
    return [sum(Fraction(v) ** 2 for v in row) for row in rows.tolist()]


def main(tmp):
    source, target = f"{tmp}/gradients.zarr", f"{tmp}/clipped.zarr"
    digits, random = load_digits(), np.random.default_rng(0)
    batch = random.random(1797) < BATCH / 1797
    parameters = [random.normal(0, 0.1, shape).astype("f4") for shape in SHAPES.values()]
    before = gradients(np.float32(digits.data[batch] / 16), digits.target[batch], *parameters)
    for name, g in zip(SHAPES, before, strict=True):
        zarr.open_group(source).create_array(name, data=g, chunks=(32, *g.shape[1:]))
    # daskclip run gradients.zarr clipped.zarr --clip-norm 1.9 --global --axes 1:
    report = daskclip.clip_zarr(source, target, LIMIT, axes=slice(1, None), global_norm=True)
    daskclip.verify_zarr(target, source)
    after = [zarr.open_array(f"{target}/{name}", mode="r")[...] for name in SHAPES]
    for p, g in zip(parameters, after, strict=True):
        p -= 0.5 / BATCH * (g.sum(axis=0) + random.normal(0, NOISE * LIMIT, p.shape))
    norms = np.sqrt(sum((g.reshape(len(g), -1) ** 2).sum(axis=1) for g in before))
    by_hand = [(g.T * np.minimum(1, LIMIT / norms)).T for g in before]
    squares = [squared_norms(arrays) for arrays in (by_hand, after)]
    above = [sum(n > Fraction(LIMIT) ** 2 for n in each) for each in squares]
    print(report, TEXT.format(above[0], report.clipped, above[1]), sep="\n\n")
    assert max(squares[1]) <= Fraction(report.largest_norm_after) ** 2 <= Fraction(LIMIT) ** 2


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
