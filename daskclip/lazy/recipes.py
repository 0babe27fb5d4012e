"""Chunks that are made again instead of held.

The second pass needs every chunk of the source once more. Referring to it by its key would keep
all chunks in memory from the first pass on (dask/dask#874); cloning its graph works only for some
layers. A recipe is one chunk's own small graph as an opaque value: a task that is given one makes
the chunk when it runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
from dask.core import flatten, get_dependencies, istask, toposort
from dask.typing import Key

Graph = dict[Key, Any]

# a result that several chunks use, such as a mean, is made once and held if the array it belongs
# to is this many times smaller than the clipped one
SMALLER = 16
# a larger one is held if more chunks use it: making it again for each would take too long
USERS = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """Tasks that make one chunk, and their inputs."""

    graph: Graph
    """Tasks to run; empty where the chunk itself is among the inputs."""
    key: Key
    """Key of the chunk."""
    inputs: list[Key]
    """Keys of the results that the tasks need from outside."""

    def make(self, values: Sequence[Any]) -> Any:
        """Return the chunk, given the values of ``inputs``."""
        given = {k: (LiteralTask(v),) for k, v in zip(self.inputs, values, strict=True)}
        return dask.get({**self.graph, **given}, self.key)


@dataclass(frozen=True, slots=True)
class LiteralTask:
    """A task without arguments, so that Dask does not look for tasks inside its value."""

    value: Any

    def __call__(self) -> Any:
        return self.value


def chunk_recipes(x: da.Array, keep: bool) -> tuple[dict[Key, Recipe], set[str]]:
    """Recipes of all chunks, by key, and the layers of ``x`` that hold their inputs.

    Data in memory (arrays, persisted chunks, futures) and results worth holding are inputs, not
    part of the recipes; with ``keep``, so are the chunks themselves.
    """
    graph: Graph = {}
    layer_of: dict[Key, str] = {}
    small = set()
    for name, layer in x.dask.layers.items():
        graph.update(layer)
        layer_of.update(dict.fromkeys(layer, name))
        if SMALLER * _nbytes(layer.collection_annotations or {}) <= x.nbytes:
            small.add(name)
    outputs = list(flatten(x.__dask_keys__()))
    if keep:
        recipes = {k: Recipe({}, k, [k]) for k in outputs}
    else:
        recipes = _split(graph, outputs, lambda key: 1 if layer_of[key] in small else USERS)
    return recipes, {layer_of[k] for recipe in recipes.values() for k in recipe.inputs}


def _split(
    graph: Graph, outputs: Sequence[Key], most_users: Callable[[Key], int]
) -> dict[Key, Recipe]:
    """Cut a graph into one for each output; what has more users than allowed becomes an input."""
    needs = {k: get_dependencies(graph, k) for k in graph}
    # outputs that need a key; those of a key are complete when its turn comes
    users: dict[Key, set[Key]] = {k: {k} for k in outputs}
    recipes = {k: Recipe({}, k, []) for k in outputs}
    for key in reversed(toposort(graph, needs)):
        used_by = users.pop(key, set())
        # a value that needs others is an alias, not data
        is_data = not (needs[key] or istask(graph[key]))
        if is_data or len(used_by) > most_users(key):
            for k in used_by:
                recipes[k].inputs.append(key)
            continue
        for k in used_by:
            recipes[k].graph[key] = graph[key]
        for need in needs[key]:
            users.setdefault(need, set()).update(used_by)
    return recipes


def _nbytes(known: Mapping[str, Any]) -> float:
    """Size of the array that a layer makes; infinite where the layer does not say."""
    if "shape" not in known or "dtype" not in known:
        return math.inf
    return float(math.prod(known["shape"]) * known["dtype"].itemsize)
