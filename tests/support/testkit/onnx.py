"""Small ONNX files written byte by byte, so that tests need no library that writes them.

Field numbers are those of onnx.proto3 (ModelProto, GraphProto, NodeProto, ValueInfoProto ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FLOAT, INT64, DOUBLE = 1, 7, 11


@dataclass(frozen=True)
class Port:
    """An input or output: name, shape (a text is a free dimension), type of its elements."""

    name: str
    shape: Sequence[int | str]
    type: int = FLOAT


def network(
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    nodes: Sequence[tuple[str, Sequence[str], Sequence[str]]],
    opset: int = 17,
    domain: str = "",
) -> bytes:
    """Return a model of nodes (operator, input names, output names)."""
    graph = b"".join(_field(1, _node(*node, domain)) for node in nodes)
    graph += _field(2, b"graph")
    graph += b"".join(_field(11, _port(port)) for port in inputs)
    graph += b"".join(_field(12, _port(port)) for port in outputs)
    operators = _field(1, b"") + _number(2, opset)
    return _number(1, 8) + _field(7, graph) + _field(8, operators)


def _node(operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str) -> bytes:
    named = b"".join(_field(1, name.encode()) for name in inputs)
    named += b"".join(_field(2, name.encode()) for name in outputs)
    return named + _field(4, operator.encode()) + (_field(7, domain.encode()) if domain else b"")


def _port(port: Port) -> bytes:
    dimensions = b"".join(
        _field(1, _number(1, d) if isinstance(d, int) else _field(2, d.encode())) for d in port.shape
    )
    tensor = _number(1, port.type) + _field(2, dimensions)
    return _field(1, port.name.encode()) + _field(2, _field(1, tensor))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
