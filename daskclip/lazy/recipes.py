"""Chunks that are made again instead of held.

The second pass needs every chunk of the source once more. Referring to it by its key would keep
all chunks in memory from the first pass on (dask/dask#874); cloning its graph works only for some
layers. A recipe is one chunk's own small graph as an opaque value: a task that is given one makes
the chunk when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
from dask.core import flatten, get_dependencies, istask, toposort

# results that several chunks use are made once and held if their array is this many times smaller
# than the clipped one, such as a mean; larger ones only if more chunks use them than
SMALLER = 16
USERS = 64


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
        given = {k: (LiteralTask(v),) for k, v in zip(self.inputs, values, strict=True)}
        return dask.get({**self.graph, **given}, self.key)


@dataclass(frozen=True, slots=True)
class LiteralTask:
    """A task without arguments, so that Dask does not look for tasks inside its value."""

    value: Any

    def __call__(self) -> Any:
        return self.value


def recipes(x: da.Array, hold: bool) -> tuple[dict[Any, Recipe], set[str]]:
    """Recipes of all chunks, by key, and the layers of ``x`` that hold their inputs.

    Data in memory (arrays, persisted chunks, futures) and results worth holding are inputs, not
    part of the recipes; with ``hold``, so are the chunks themselves.
    """
    graph: dict[Any, Any] = {}
    layer_of: dict[Any, str] = {}
    small = set()
    for name, layer in x.dask.layers.items():
        graph.update(layer)
        layer_of.update(dict.fromkeys(layer, name))
        if SMALLER * _nbytes(layer.collection_annotations or {}) <= x.nbytes:
            small.add(name)
    outputs = list(flatten(x.__dask_keys__()))
    if hold:
        return {k: Recipe({}, k, (k,)) for k in outputs}, {layer_of[k] for k in outputs}
    needs = {k: get_dependencies(graph, k) for k in graph}
    users: dict[Any, set[Any]] = {k: {k} for k in outputs}
    parts: dict[Any, tuple[dict[Any, Any], list[Any]]] = {k: ({}, []) for k in outputs}
    for key in reversed(toposort(graph, needs)):
        used_by = users.pop(key, ())
        held = len(used_by) > (1 if layer_of[key] in small else USERS)
        # a value that needs others is an alias, not data
        if held or not (needs[key] or istask(graph[key])):
            for k in used_by:
                parts[k][1].append(key)
            continue
        for k in used_by:
            parts[k][0][key] = graph[key]
        for need in needs[key]:
            users.setdefault(need, set()).update(used_by)
    made = {k: Recipe(tasks, k, tuple(inputs)) for k, (tasks, inputs) in parts.items()}
    return made, {layer_of[k] for r in made.values() for k in r.inputs}


def _nbytes(known: Mapping[str, Any]) -> float:
    """Size of the array that a layer makes; infinite where the layer does not say."""
    if "shape" not in known or "dtype" not in known:
        return math.inf
    return float(math.prod(known["shape"]) * known["dtype"].itemsize)
