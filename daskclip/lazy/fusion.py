"""The layers that make an array, fused with the layer that uses it.

Where each chunk comes from one chunk of every layer, as those of a stored array and of what is
computed from it element by element, all layers together are one. It needs no chunk that another
layer makes, and describes a million chunks as briefly as ten.
"""

from collections.abc import Collection, Iterable
from copy import copy

import dask.array as da

# private, but nothing public tells data from a task
from dask._task_spec import DataNode, convert_legacy_graph
from dask.blockwise import Blockwise, optimize_blockwise
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer

from daskclip.lazy.recipes import Annotations, merge_annotations


def fuse_source(x: da.Array, name: str, layer: Blockwise) -> HighLevelGraph | None:
    """Fuse all layers of ``x`` into a layer that uses each of its chunks once.

    Parameters
    ----------
    x : dask Array
        Of any layers.
    name : str
        Name of ``layer``.
    layer : Blockwise
        Made by `dask.array.map_blocks` from ``x`` and others.

    Returns
    -------
    HighLevelGraph or None
        The fused layer and the layers of ``x`` that hold data. None if other layers would remain,
        if several chunks along an axis of ``x`` need one chunk or one needs several, or if
        annotations differ from chunk to chunk or name different places.
    """
    # the last layer first, as for the tasks of a recipe
    layers: dict[str, Layer] = {name: layer, **dict(reversed(x.dask.layers.items()))}
    annotations = _annotations(layers.values())
    if annotations is None:
        return None
    # without a first pass, since Dask fuses no layer that two others use
    bare = {n: _without_annotations(each) for n, each in layers.items()}
    graph = HighLevelGraph(bare, {**x.dask.dependencies, name: {x.name}})
    fused = optimize_blockwise(graph, [name])
    kept = {n: layers[n] for n in fused.layers if n != name}
    inside = layers.keys() - kept.keys()
    is_whole = all(_is_data(each) and not fused.dependencies[n] for n, each in kept.items())
    if not (is_whole and all(_is_one_to_one(layers[n], inside) for n in inside)):
        return None
    whole = fused.layers[name]
    whole.annotations = dict(annotations) or None
    return HighLevelGraph({name: whole, **kept}, fused.dependencies)


def _annotations(layers: Iterable[Layer]) -> Annotations | None:
    """Annotations of the fused layer; None if no layer could have them all."""
    found = [each.annotations or {} for each in layers if isinstance(each, Blockwise)]
    is_by_key = any(callable(v) for own in found for v in own.values())
    return None if is_by_key else merge_annotations(found)


def _without_annotations(layer: Layer) -> Layer:
    """The same layer without annotations, which Dask would merge in another way."""
    bare = copy(layer)
    bare.annotations = None
    return bare


def _is_one_to_one(layer: Layer, others: Collection[str]) -> bool:
    """Whether a layer takes one chunk of others for each of its own, and no chunk for several."""
    if not isinstance(layer, Blockwise):
        return False
    split = {i for i in layer.output_indices if layer.dims[i] > 1}
    return all(
        {i for i, n in zip(index, layer.numblocks[name], strict=True) if n > 1} == split
        for name, index in layer.indices
        if index is not None and isinstance(name, str) and name in others
    )


def _is_data(layer: Layer) -> bool:
    """Whether a layer has arrays, futures or other objects and no tasks."""
    # a future in a graph stands for its own key, and is left out here
    return isinstance(layer, MaterializedLayer) and all(
        isinstance(node, DataNode) for node in convert_legacy_graph(layer).values()
    )
