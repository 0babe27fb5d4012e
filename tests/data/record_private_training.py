"""Record what Opacus and jax-privacy make of the gradients of a small network, for each example.

Writes opacus.npz and jax_privacy.npz beside this file, by

    pip install opacus==1.6.0 torch==2.6.0 && python record_private_training.py opacus
    pip install jax-privacy==2.0.0 jax==0.10.2 && python record_private_training.py jax_privacy

on a CPU. Each file holds the limit and, for each parameter of the network, the gradients before
and after clipping, whose first axis has the examples; each package computed both.
"""

import sys
from pathlib import Path

import numpy as np

LIMIT = 1.5
EXAMPLES, INPUTS, HIDDEN, OUTPUTS = 24, 16, 12, 5
NAMES = "w1", "b1", "w2", "b2"
SHAPES = (HIDDEN, INPUTS), (HIDDEN,), (OUTPUTS, HIDDEN), (OUTPUTS,)


def network():
    """Examples, their classes and the parameters of a network of two layers."""
    random = np.random.default_rng(0)
    # of several sizes, so that some gradients are within the limit
    x = random.normal(size=(EXAMPLES, INPUTS)) * np.geomspace(0.05, 3, EXAMPLES)[:, None]
    classes = random.integers(0, OUTPUTS, EXAMPLES)
    parameters = [0.5 * random.normal(size=shape) for shape in SHAPES]
    return x.astype("f4"), classes, [p.astype("f4") for p in parameters]


def opacus():
    """Flat clipping by the optimizer of Opacus, with one example in each batch."""
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    x, classes, parameters = network()
    layers = torch.nn.Linear(INPUTS, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, OUTPUTS)
    model = GradSampleModule(torch.nn.Sequential(*layers))
    before, after = ([[] for _ in NAMES] for _ in range(2))
    for k in range(EXAMPLES):
        with torch.no_grad():
            for p, value in zip(model.parameters(), parameters, strict=True):
                p.copy_(torch.from_numpy(value))
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0,
            max_grad_norm=LIMIT, expected_batch_size=1,
        )  # fmt: skip
        optimizer.zero_grad()
        output = model(torch.from_numpy(x[k : k + 1]))
        torch.nn.functional.cross_entropy(output, torch.from_numpy(classes[k : k + 1])).backward()
        samples = [g.numpy().copy() for g in optimizer.grad_samples]
        optimizer.clip_and_accumulate()
        for i, p in enumerate(model.parameters()):
            before[i].append(samples[i][0])
            after[i].append(p.summed_grad.numpy().copy())
    return before, after


def jax_privacy():
    """Each example by clip_pytree of jax-privacy."""
    import jax
    from jax_privacy.clipping import clip_pytree

    x, classes, parameters = network()

    def loss(p, one, label):
        hidden = jax.nn.relu(p[0] @ one + p[1])
        return -jax.nn.log_softmax(p[2] @ hidden + p[3])[label]

    before = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(parameters, x, classes)
    after = jax.vmap(lambda g: clip_pytree(g, LIMIT)[0])(before)
    return before, after


if __name__ == "__main__":
    package = sys.argv[1]
    before, after = {"opacus": opacus, "jax_privacy": jax_privacy}[package]()
    arrays = {f"{name}_before": np.array(g) for name, g in zip(NAMES, before, strict=True)}
    arrays |= {f"{name}_after": np.array(g) for name, g in zip(NAMES, after, strict=True)}
    path = Path(__file__).parent / f"{package}.npz"
    np.savez_compressed(path, limit=LIMIT, **arrays)
