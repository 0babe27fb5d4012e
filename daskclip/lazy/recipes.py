"""Chunks that are made again instead of held.

The second pass needs every chunk of the source once more. Referring to it by its key would keep
all chunks in memory from the first pass on (dask/dask#874); fusing its layers works only for some
(see `fusion`). A recipe is one chunk's own small graph as an opaque value: a task that is given one
makes the chunk when it runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dask
import dask.array as da

# private, but nothing public tells a future from a task, or refers to the key of one
from dask._task_spec import DataNode, TaskRef, convert_legacy_graph
from dask.core import flatten, toposort
from dask.typing import Key

Graph = dict[Key, Any]
Annotations = Mapping[str, Any]

# a result that several chunks use, such as a mean, is made once and held if the array it belongs
# to is this many times smaller than the clipped one
SMALLER = 16
# a larger one is held if more chunks use it: making it again for each would take too long
USERS = 64
# annotations that say which workers can run a task
PLACES = ("workers", "resources", "allow_other_workers")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Tasks that make one chunk, and their inputs."""

    graph: Graph
    """Tasks to run; empty where the chunk itself is among the inputs."""
    key: Key
    """Key of the chunk."""
    inputs: list[Key]
    """Keys of the results that the tasks need from outside."""
    annotations: Annotations = field(default_factory=dict)
    """Annotations of the layers of the tasks: where and how to run them."""

    @property
    def references(self) -> list[TaskRef]:
        """References to ``inputs``; Dask knows a plain key by the graph, where futures are not."""
        return [TaskRef(key) for key in self.inputs]

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


def chunk_recipes(x: da.Array) -> tuple[dict[Key, Recipe], set[str]]:
    """Recipes of all chunks, by key, and the layers of ``x`` that hold their inputs.

    Data in memory (arrays, persisted chunks, futures) and results worth holding are inputs, not
    part of the recipes. So is a chunk whose layers are annotated with different places: no worker
    may be able to run all of its tasks.
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
    recipes = _split(graph, outputs, lambda key: 1 if layer_of[key] in small else USERS)
    known = {name: layer.annotations for name, layer in x.dask.layers.items()}
    if any(known.values()):
        recipes = {k: _annotated(r, known, layer_of) for k, r in recipes.items()}
    # the key of a future may be in no layer
    inputs = {k for recipe in recipes.values() for k in recipe.inputs}
    return recipes, {layer_of[k] for k in inputs if k in layer_of}


def _split(
    graph: Graph, outputs: Sequence[Key], most_users: Callable[[Key], int]
) -> dict[Key, Recipe]:
    """Cut a graph into one for each output; what has more users than allowed becomes an input."""
    # a future in a graph stands for its own key, and is left out here
    graph = convert_legacy_graph(graph)
    needs = {k: node.dependencies for k, node in graph.items()}
    # what is in no graph is a future, which is data
    needs |= dict.fromkeys({*outputs}.union(*needs.values()) - graph.keys(), frozenset())
    # outputs that need a key; those of a key are complete when its turn comes
    users: dict[Key, set[Key]] = {k: {k} for k in outputs}
    recipes = {k: Recipe({}, k, []) for k in outputs}
    for key in reversed(toposort(needs, needs)):
        used_by = users.pop(key, set())
        is_data = isinstance(graph.get(key), DataNode | None)
        if is_data or len(used_by) > most_users(key):
            for k in used_by:
                recipes[k].inputs.append(key)
            continue
        for k in used_by:
            recipes[k].graph[key] = graph[key]
        for need in needs[key]:
            users.setdefault(need, set()).update(used_by)
    return recipes


def _annotated(
    recipe: Recipe, known: Mapping[str, Annotations | None], layer_of: Mapping[Key, str]
) -> Recipe:
    """Recipe with the annotations of its layers; the chunk itself if their places contradict."""
    active = (recipe.key, dask.get_annotations())
    found = [
        {kind: v(key) if callable(v) else v for kind, v in (annotations or {}).items()}
        for key, annotations in (active, *((k, known[layer_of[k]]) for k in recipe.graph))
    ]
    merged = merge_annotations(found)
    if merged is None:
        return Recipe({}, recipe.key, [recipe.key], found[0])
    return Recipe(recipe.graph, recipe.key, recipe.inputs, merged)


def merge_annotations(found: Sequence[Annotations]) -> Annotations | None:
    """Annotations of a task that does what several would do; None if their places contradict."""
    places = [p for own in found if (p := {k: own[k] for k in PLACES if own.get(k)})]
    if any(place != places[0] for place in places):
        return None
    merged = {kind: v for own in found for kind, v in own.items()}
    # the largest, as where Dask fuses layers
    for kind in {"retries", "priority"} & {*merged}:
        merged[kind] = max(own[kind] for own in found if kind in own)
    return merged


def _nbytes(known: Mapping[str, Any]) -> float:
    """Size of the array that a layer makes; infinite where the layer does not say."""
    if "shape" not in known or "dtype" not in known:
        return math.inf
    return float(math.prod(known["shape"]) * known["dtype"].itemsize)
