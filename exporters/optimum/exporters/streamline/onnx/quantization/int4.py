"""Quantize weights to 4 bits: each matmul becomes ONNX Runtime's `MatMulNBits`; a tied embedding is stored once.

Rounding to nearest and HQQ quantize one weight at a time, when the graph is saved; ONNX Runtime's own
`MatMulNBitsQuantizer` would hold all weights at once. GPTQ needs calibration text, and gets a few layers at a time. The
quantized operators run on ONNX Runtime alone, so the graph is also fused for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.neural_compressor import gptq_quantize
from onnxruntime.quantization.neural_compressor.util import MAXIMUM_PROTOBUF

from optimum.exporters.streamline.graph_files import GRAPH_FILE, WEIGHTS_FILE
from optimum.exporters.streamline.rewriting.excluded_nodes import excluded, module_of
from optimum.exporters.streamline.rewriting.fuse_for_ort import (
    DOMAIN,
    fuse_norms,
    is_weight_matmul,
    pack_matmuls,
    split_biases,
)
from optimum.exporters.streamline.rewriting.graph_helpers import initializer, read_weight, replace_value, static_shape
from optimum.exporters.streamline.rewriting.tied_embedding import TiedEmbedding, find_tied_embedding, untie_embedding
from optimum.streamline.errors import StreamlineError

from .calibration_inputs import InputArrays
from .in_segments import quantize_in_segments
from .settings import Quantization

BITS, BLOCK = 4, 32
ACCURACY = 4  # the `accuracy_level` of MatMulNBits that multiplies with activations in 8 bits

Arrays = tuple[npt.NDArray[Any], ...]
"""A quantized weight `[K, N]`: the packed 4-bit values `[N, blocks, 16]`, the scales `[N, blocks]`, and for HQQ the
offsets `[N, blocks]`."""


def quantize_int4(source: Path, target: Path, quantization: Quantization, algorithm: str) -> None:
    """Quantize the graph in the folder `source` to 4 bits, into the folder `target`.

    Args:
        source: The folder of the float32 graph.
        target: The folder to write into.
        quantization: The excluded modules, and the calibration text.
        algorithm: `rtn` (round to nearest), `hqq` (half-quadratic quantization) or `gptq`, which reads
            `quantization.windows`.

    Raises:
        StreamlineError: ONNX Runtime's GPTQ cannot quantize a matmul of this graph.
    """
    model = ir.load(source / GRAPH_FILE)
    graph = model.graph
    split_biases(graph)
    tied = find_tied_embedding(graph)
    matmuls = [node for node in graph if is_weight_matmul(node)] + ([tied.product] if tied else [])
    kept = excluded(matmuls, quantization.exclude)
    if tied and tied.product not in kept:
        _quantize_tied(graph, tied)
    if algorithm == "gptq":
        _check_gptq(node for node in graph if is_weight_matmul(node) and node not in kept)
    pack_matmuls(graph, kept)
    with TemporaryDirectory(dir=target) as scratch:
        if algorithm == "gptq":
            model = _gptq(model, [str(node.name) for node in kept], quantization, Path(scratch))
        else:
            for node in [node for node in graph if is_weight_matmul(node) and node not in kept]:
                _quantize_matmul(graph, node, _ALGORITHMS[algorithm])
        fuse_norms(model.graph)
        model.opset_imports[DOMAIN] = 1
        ir.save(model, target / GRAPH_FILE, external_data=WEIGHTS_FILE)
    _quantized.cache_clear()


def _round_to_nearest(weight: npt.NDArray[Any]) -> Arrays:
    config = nbits.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=BITS)
    packed, scales, _ = nbits.DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight))
    return packed, scales.reshape(len(packed), -1)


def _half_quadratic(weight: npt.NDArray[Any]) -> Arrays:
    quantizer = nbits.HQQWeightOnlyQuantizer(nbits.HQQWeightOnlyQuantConfig(block_size=BLOCK, bits=BITS))
    graph = onnx.helper.make_graph([], "one", [], [], [onnx.numpy_helper.from_array(weight, "weight")])
    quantizer.quantize(onnx.helper.make_node("MatMul", ["x", "weight"], ["y"]), [graph])
    packed, scales, offsets = (onnx.numpy_helper.to_array(each) for each in graph.initializer[1:])
    return packed, scales.reshape(len(packed), -1), offsets.reshape(len(packed), -1)


_ALGORITHMS: dict[str, Callable[[npt.NDArray[Any]], Arrays]] = {"rtn": _round_to_nearest, "hqq": _half_quadratic}


@lru_cache(maxsize=1)  # saving the graph asks for a weight's values and right after for its scales
def _quantized(quantize: Callable[[npt.NDArray[Any]], Arrays], weight: ir.Value, transposed: bool) -> Arrays:
    array = read_weight(weight)
    return quantize(array.T if transposed else array)


def _parts(
    graph: ir.Graph, weight: ir.Value, quantize: Callable[[npt.NDArray[Any]], Arrays], transposed: bool = False
) -> list[ir.Value]:
    """Add initializers for a weight's packed values, scales and, for HQQ, offsets; computed when the graph is saved."""
    depth, width = reversed(static_shape(weight)) if transposed else static_shape(weight)
    blocks = -(-depth // BLOCK)
    kinds = [
        ("Q4", ir.DataType.UINT8, [width, blocks, BLOCK * BITS // 8]),
        ("scales", ir.DataType.FLOAT, [width, blocks]),
    ]
    if quantize is _half_quadratic:
        kinds.append(("zero_points", ir.DataType.FLOAT, [width, blocks]))

    def read(index: int) -> Callable[[], ir.TensorProtocol]:
        return lambda: ir.tensor(_quantized(quantize, weight, transposed)[index])

    return [
        initializer(graph, ir.LazyTensor(read(index), dtype=dtype, shape=ir.Shape(size), name=f"{weight.name}_{kind}"))
        for index, (kind, dtype, size) in enumerate(kinds)
    ]


def _matmul_nbits(node: ir.Node, parts: list[ir.Value], depth: int) -> ir.Node:
    """A `MatMulNBits` that replaces the `MatMul` `node`, with a weight of `depth` rows in 4 bits."""
    width = static_shape(parts[0])[0]
    options = {"K": depth, "N": width, "bits": BITS, "block_size": BLOCK, "accuracy_level": ACCURACY}
    return ir.node("MatMulNBits", [node.inputs[0], *parts], options, domain=DOMAIN, name=f"{node.name}NBits")


def _quantize_matmul(graph: ir.Graph, node: ir.Node, quantize: Callable[[npt.NDArray[Any]], Arrays]) -> None:
    weight = node.inputs[1]
    assert weight is not None
    made = _matmul_nbits(node, _parts(graph, weight, quantize), static_shape(weight)[0])
    graph.insert_before(node, made)
    replace_value(node.outputs[0], made.outputs[0])
    graph.remove(node, safe=True)
    del graph.initializers[str(weight.name)]


def _quantize_tied(graph: ir.Graph, tied: TiedEmbedding) -> None:
    """Store a tied embedding once, in 4 bits rounded to nearest, which both the lookup and the matmul can read.

    A width that is no multiple of the block size is untied instead.
    """
    vocabulary, width = static_shape(tied.weight)
    if width % BLOCK:
        untie_embedding(graph)
        return
    numbers, scales = _parts(graph, tied.weight, _round_to_nearest, transposed=True)
    rows = initializer(graph, ir.tensor(np.array([vocabulary, width // 2]), name=f"{tied.weight.name}_rows"))
    flat = ir.node("Reshape", [numbers, rows], name=f"{tied.lookup.name}/rows")
    flat.outputs[0].dtype = ir.DataType.UINT8
    options = {"bits": BITS, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    lookup = ir.node(
        "GatherBlockQuantized", [flat.outputs[0], tied.lookup.inputs[1], scales], options, domain=DOMAIN,
        name=f"{tied.lookup.name}BlockQuantized",
    )  # fmt: skip
    product = _matmul_nbits(tied.product, [numbers, scales], width)
    graph.insert_before(tied.lookup, [flat, lookup])
    graph.insert_before(tied.product, product)
    replace_value(tied.lookup.outputs[0], lookup.outputs[0])
    replace_value(tied.product.outputs[0], product.outputs[0])
    graph.remove([tied.lookup, tied.product, tied.transposition], safe=True)
    del graph.initializers[str(tied.weight.name)]


def _check_gptq(matmuls: Iterable[ir.Node]) -> None:
    """Refuse matmuls that ONNX Runtime's GPTQ cannot quantize: of experts, and with an odd number of blocks."""
    for node in matmuls:
        if ".experts" in module_of(node):
            raise StreamlineError(
                f"quantize 'int4-gptq': {module_of(node)} is in an expert, and ONNX Runtime's GPTQ fails if the text "
                "routes no token to an expert; use 'int4', or quantize-exclude the experts"
            )
        depth = static_shape(node.inputs[1])[0]
        if -(-depth // BLOCK) % 2:
            raise StreamlineError(
                f"quantize 'int4-gptq': {module_of(node)} has an input width of {depth}, an odd number of blocks of "
                f"{BLOCK}, whose offsets ONNX Runtime's GPTQ cannot pack; use 'int4', or quantize-exclude it"
            )


def _gptq(model: ir.Model, kept: Collection[str], quantization: Quantization, scratch: Path) -> ir.Model:
    """The graph quantized by GPTQ, except the nodes whose names are in `kept`."""
    # With offsets ("asym"): without them onnxruntime's GPTQ is worse than rounding to nearest (measured).
    four_bits = {"bits": BITS, "group_size": BLOCK, "scheme": "asym"}
    matmuls = [str(node.name) for node in model.graph if is_weight_matmul(node)]
    config_by_node = {name: "fp32" if name in kept else four_bits for name in matmuls}

    def quantize(plain: Path, quantized: Path, inputs: Iterator[InputArrays]) -> None:
        samples = [(each, None) for each in inputs]
        # It takes a graph of more than 2 GB as a path only, and a smaller one not as a path.
        graph = str(plain) if (plain.parent / WEIGHTS_FILE).stat().st_size > MAXIMUM_PROTOBUF else onnx.load(plain)
        result = gptq_quantize(graph, samples, config_by_node, blocksize=BLOCK, n_samples=-1, accuracy_level=ACCURACY)
        onnx.save(result.model, quantized, save_as_external_data=True, location=WEIGHTS_FILE)

    return quantize_in_segments(model, quantization, scratch, quantize)
