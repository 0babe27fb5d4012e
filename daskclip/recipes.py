"""Chunks that are made again instead of held.

The second pass needs every chunk of the source once more. Referring to it by its key would keep
all chunks in memory from the first pass on (dask/dask#874); cloning its graph works only for some
layers. A recipe is one chunk's own small graph as an opaque value: a task that is given one makes
the chunk when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
from dask.core import flatten, get_dependencies, istask, toposort

# a result that more chunks than this use, or several if more tasks than this make it, is made once
# and held
SHARED = 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make one chunk."""

    graph: dict[Any, Any]
    """Tasks to run; empty where the chunk itself is among the inputs."""
    key: Any
    """Key of the chunk."""
    inputs: tuple[Any, ...]
    """Keys of results that the tasks need from outside."""

    def make(self, values: list[Any]) -> Any:
        """The chunk, from the values of ``inputs``."""
        given = {k: (Constant(v),) for k, v in zip(self.inputs, values, strict=True)}
        return dask.get({**self.graph, **given}, self.key)


@dataclass(frozen=True, slots=True)
class Constant:
    """A task without arguments, so that Dask does not look for tasks inside its value."""

    value: Any

    def __call__(self) -> Any:
        return self.value


def recipes(x: da.Array, hold: bool) -> tuple[dict[Any, Recipe], set[str]]:
    """Recipes of all chunks, by key, and the layers of ``x`` that hold their inputs.

    Data in memory (arrays, persisted chunks, futures) and results that many chunks use, such as a
    mean, are inputs, not part of the recipes; with ``hold``, so are the chunks themselves.
    """
    graph: dict[Any, Any] = {}
    layer_of: dict[Any, str] = {}
    for name, layer in x.dask.layers.items():
        graph.update(layer)
        layer_of.update(dict.fromkeys(layer, name))
    outputs = list(flatten(x.__dask_keys__()))
    if hold:
        return {k: Recipe({}, k, (k,)) for k in outputs}, {layer_of[k] for k in outputs}
    needs = {k: get_dependencies(graph, k) for k in graph}
    users: dict[Any, set[Any]] = {k: {k} for k in outputs}
    size: dict[Any, int] = {}
    order = toposort(graph, needs)
    for key in order:
        size[key] = min(SHARED + 1, 1 + sum(size[k] for k in needs[key]))
    parts: dict[Any, tuple[dict[Any, Any], list[Any]]] = {k: ({}, []) for k in outputs}
    for key in reversed(order):
        used_by = users.pop(key, ())
        costly = len(used_by) > SHARED or (len(used_by) > 1 and size[key] > SHARED)
        if costly or not istask(graph[key]):
            for k in used_by:
                parts[k][1].append(key)
            continue
        for k in used_by:
            parts[k][0][key] = graph[key]
        for need in needs[key]:
            users.setdefault(need, set()).update(used_by)
    made = {k: Recipe(tasks, k, tuple(inputs)) for k, (tasks, inputs) in parts.items()}
    return made, {layer_of[k] for r in made.values() for k in r.inputs}
