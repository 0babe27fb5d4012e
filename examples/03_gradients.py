"""Clip per-example gradients of a real network, as differentially private training does.

It shows how to clip many slices of a store that is larger than the memory budget: the gradients of
a small network for each of scikit-learn's 1,797 digits, 37,888 numbers in a row, 260 MiB in all.
"""

import tempfile

import dask
import numpy as np
import zarr
from scipy.special import softmax
from sklearn.datasets import load_digits

import daskclip

TEXT = """DP-SGD scales its noise to the limit, {}, so no row that it adds up may exceed it.
x * minimum(1, limit / norm) in float32 leaves {} of {} clipped rows above it, daskclip {}."""


def gradients(x, y, w1, w2):
    """Gradients of the cross-entropy with respect to w1 and w2, a row for each example."""
    hidden = np.maximum(x @ w1, 0)
    error2 = softmax(hidden @ w2, axis=1) - np.eye(10, dtype=x.dtype)[y]
    error1 = error2 @ w2.T * (hidden > 0)
    outer = x[:, :, None] * error1[:, None], hidden[:, :, None] * error2[:, None]
    return np.concatenate([g.reshape(len(x), -1) for g in outer], axis=1)


def main(tmp):
    source, target = f"{tmp}/gradients.zarr", f"{tmp}/clipped.zarr"
    digits, random = load_digits(), np.random.default_rng(0)
    x, y = np.float32(digits.data / 16), digits.target
    w1, w2 = (random.normal(0, 0.05, n).astype(np.float32) for n in [(64, 512), (512, 10)])
    batches = [slice(i, i + 16) for i in range(0, len(x), 16)]
    for b in batches:
        steps = np.split(0.1 * gradients(x[b], y[b], w1, w2).mean(axis=0), [w1.size])
        w1, w2 = w1 - steps[0].reshape(w1.shape), w2 - steps[1].reshape(w2.shape)
    store = zarr.create_array(source, shape=(1797, 37888), chunks=(16, 37888), dtype="float32")
    for b in batches:
        store[b] = gradients(x[b], y[b], w1, w2)
    with dask.config.set(num_workers=2):  # two threads, which share the 64 MiB
        norms = daskclip.norm(store, axes=1).compute()
        limit = round(float(np.median(norms)), 3)
        report = daskclip.clip_zarr(source, target, limit, axes=1, memory="64MiB")

    result, above, plain_above = zarr.open_array(target), 0, 0
    for b in batches:
        before, after = store[b], result[b]
        plain = before * np.minimum(1, limit / norms[b]).astype(np.float32)[:, None]
        above += (np.linalg.norm(np.float64(after), axis=1) > limit).sum()
        plain_above += (np.linalg.norm(np.float64(plain), axis=1) > limit).sum()
        assert (after.view("u4") == before.view("u4"))[norms[b] <= limit].all()
    print(report, TEXT.format(limit, plain_above, report.clipped, above), sep="\n\n")
    assert above == 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
