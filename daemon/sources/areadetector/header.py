"""The JSON header of an array that areaDetector's ZeroMQ plug-in (ADZMQ, NDPluginZMQ) sends.

``{"htype": "array-1.0", "type", "shape", "frame", "timeStamp", "encoding", "ndattr": {...}}``, as the
plug-in's source and the `array-1.0` description of the Paul Scherrer Institute have it. What differs
between versions of the plug-in shows in `htype`: up to 1.3 it was a list, ``["array-1.0"]`` (first
``["chunk-1.0"]``), and the shape began with the fastest axis, [x, y]; since 1.4 it is a string, and the
shape begins with the slowest axis, [y, x]. `timeStamp` and `encoding` are missing in the oldest ones.

The plug-in puts its JSON together by hand. NDAttributes that are not a number are written as ``nan``,
texts are not escaped: such headers are no JSON, and their images are read all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec

from daemon.sources.fields import LARGEST, need, shown, text, whole
from daemon.sources.json_parts import MAX_JSON_BYTES, Part, json_object, plain
from pipelines.frame import BadFrame

ARRAY: Final = "array-1.0"
CHUNK: Final = "chunk-1.0"
#: Types of pixels, without a byte order.
PIXEL_TYPES: Final[Mapping[str, str]] = {
    "int8": "i1",
    "uint8": "u1",
    "int16": "i2",
    "uint16": "u2",
    "int32": "i4",
    "uint32": "u4",
    "int64": "i8",
    "uint64": "u8",
    "float16": "f2",
    "float32": "f4",
    "float64": "f8",
}
BYTE_ORDERS: Final[Mapping[str, str]] = {"little": "<", "big": ">"}
_DECTRIS: Final = ("dheader-1.0", "dimage-1.0", "dseries_end-1.0")
#: NDColorMode of images that are no grey ones, whatever their shape is.
COLOURS: Final = {1: "Bayer", 2: "RGB1", 3: "RGB2", 4: "RGB3", 5: "YUV444", 6: "YUV422", 7: "YUV421"}
#: ND_ARRAY_MAX_DIMS
MAX_DIMENSIONS: Final = 10

ShapeOrder = Literal["auto", "xy", "yx"]

_Whole = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
_Size = Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]
_Number = Annotated[int, msgspec.Meta(ge=-LARGEST, le=LARGEST)]

# A text, to its end or to that of the header, or a number that C++ writes and JSON has not.
_NOT_A_NUMBER: Final = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|$)|-?\b(?:nan|inf)\b', re.DOTALL)


class Header(msgspec.Struct, frozen=True):
    """What a header says of an image.

    Attributes
    ----------
    frame : int
        The `uniqueId` of the NDArray.
    shape : tuple of int
        Rows and columns.
    pixel_type : str
        numpy type string with the byte order of the wire.
    encoding : str
        The codec of the NDArray, "" for none.
    time_stamp : float or None
        Seconds since an epoch that the driver chose.
    attributes : dict
        NDAttributes, plain values.
    complaint : str
        What is wrong with the attributes, "" for nothing.
    """

    frame: int
    shape: tuple[int, int]
    pixel_type: str
    encoding: str
    time_stamp: float | None
    attributes: dict[str, Any] = {}
    complaint: str = ""


class _Usual(msgspec.Struct):
    """A header as the plug-in writes it."""

    htype: Literal["array-1.0"] | tuple[Literal["array-1.0", "chunk-1.0"]]
    type: Literal[
        "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"
    ]
    shape: tuple[_Size, _Size]
    frame: _Whole
    timeStamp: float | None = None
    encoding: str = ""
    endianness: Literal["little", "big"] = "little"
    # As an example of the format's description spells it, and programs that were written after it.
    endianess: Literal["little", "big"] | None = None
    ndattr: dict[str, bool | _Number | float | str | None] = {}


_USUAL: Final = msgspec.json.Decoder(_Usual)


def usual_header(part: Part, order: ShapeOrder) -> Header | None:
    """Return a header without anything unusual; None leaves it to `header_fields` and `read_header`."""
    if len(part) > MAX_JSON_BYTES:
        return None
    try:
        said = _USUAL.decode(part)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    attributes = said.ndattr
    if not said.encoding.isprintable() or attributes.get("ColorMode") in COLOURS:
        return None
    first, second = said.shape
    shape = (second, first) if _fastest_first(said.htype, order) else (first, second)
    byte_order = BYTE_ORDERS[said.endianess or said.endianness]
    return Header(
        said.frame, shape, byte_order + PIXEL_TYPES[said.type], said.encoding, said.timeStamp, attributes
    )


def header_fields(part: Part) -> tuple[dict[str, Any], str]:
    """Return the fields of a header, and what had to be left out of it ("" for nothing).

    Raises
    ------
    BadFrame
        If it is no JSON, and the attributes are not the reason.
    """
    try:
        return json_object(part, "header"), ""
    except BadFrame as error:
        view = memoryview(part)
        if view.nbytes > MAX_JSON_BYTES:
            raise
        said = str(view, "utf-8", "replace")
        repaired = _NOT_A_NUMBER.sub(lambda m: m[0] if m[0].startswith('"') else "null", said)
        front, key, _ = repaired.partition('"ndattr"')
        candidates = [(repaired, "")]
        if key:
            candidates.append((front.rstrip().removesuffix(",") + "}", f"NDAttributes left out: {error}"))
        for candidate, left_out in candidates:
            try:
                return json_object(candidate.encode(), "header"), left_out
            except BadFrame:
                continue
        raise


def identity(fields: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """Return number and time stamp of an array, as far as its header says them."""
    if _htype(fields.get("htype")) is None:
        return None, None
    try:
        return whole(fields, "frame", "header"), _time_stamp(fields)
    except BadFrame:
        return None, None


def read_header(fields: Mapping[str, Any], order: ShapeOrder, complaint: str = "") -> Header:
    """Return what a header says, every claim checked.

    Raises
    ------
    BadFrame
        If a key is missing or its value is none that there is, naming it.
    """
    htype = need(fields, "htype", "header")
    if _htype(htype) is None:
        hint = ', but DECTRIS Stream V1: type "dectris-v1" reads it' if htype in _DECTRIS else ""
        raise BadFrame(f"header: htype {shown(htype)} is not {ARRAY!r}{hint}")
    frame = whole(fields, "frame", "header")
    kind = text(fields, "type", "header")
    if kind not in PIXEL_TYPES:
        raise BadFrame(f"header: type {shown(kind)} is not one of {', '.join(PIXEL_TYPES)}")
    byte_order = fields.get("endianness", fields.get("endianess", "little"))
    if not isinstance(byte_order, str) or byte_order not in BYTE_ORDERS:
        raise BadFrame(f"header: endianness: expected 'little' or 'big', got {shown(byte_order)}")
    attributes, unusable = _attributes(fields.get("ndattr", {}))
    shape = _shape(need(fields, "shape", "header"), _fastest_first(htype, order), attributes)
    encoding = text(fields, "encoding", "header") if "encoding" in fields else ""
    pixel_type = BYTE_ORDERS[byte_order] + PIXEL_TYPES[kind]
    return Header(frame, shape, pixel_type, encoding, _time_stamp(fields), attributes, complaint or unusable)


def _htype(given: Any) -> str | None:
    name = given[0] if isinstance(given, list) and len(given) == 1 else given
    return name if name in (ARRAY, CHUNK) else None


def _fastest_first(htype: Any, order: ShapeOrder) -> bool:
    """Return whether the shape begins with x: by the version of the plug-in, unless that is told."""
    return htype != ARRAY if order == "auto" else order == "xy"


def _time_stamp(fields: Mapping[str, Any]) -> float | None:
    given = fields.get("timeStamp")
    if not isinstance(given, int | float) or isinstance(given, bool) or not abs(given) <= LARGEST:
        return None
    return float(given)


def _shape(given: Any, fastest_first: bool, attributes: Mapping[str, Any]) -> tuple[int, int]:
    """Return rows and columns of a grey image."""
    if (
        not isinstance(given, list)
        or not 1 <= len(given) <= MAX_DIMENSIONS
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 32 for n in given)
    ):
        raise BadFrame(f"header: shape: expected the numbers of columns and rows, got {shown(given)}")
    sizes = given[::-1] if fastest_first else given
    while len(sizes) > 2 and sizes[0] == 1:  # a stack of one image
        sizes = sizes[1:]
    mode = attributes.get("ColorMode")
    colour = COLOURS.get(mode) if isinstance(mode, int) else None
    if colour is not None or (len(sizes) == 3 and 3 in sizes):
        raise BadFrame(
            f"header: shape {shown(given)} with ColorMode {colour or 'unknown'}: colour is not read:"
            " send Mono, from an NDPluginColorConvert in front of the ZMQ plug-in"
        )
    if len(sizes) != 2:
        raise BadFrame(f"header: shape {shown(given)}: expected an image of 2 dimensions, got {len(sizes)}")
    return sizes[0], sizes[1]


def _attributes(given: Any) -> tuple[dict[str, Any], str]:
    """Return the attributes that can be kept, and what is wrong with the others."""
    if not isinstance(given, Mapping):
        return {}, f"NDAttributes left out: ndattr: expected an object, got {shown(given)}"
    kept: dict[str, Any] = {}
    unusable = []
    for key, value in given.items():
        try:
            kept[plain(key)] = plain(value)
        except BadFrame as error:
            unusable.append(f"{shown(key)}: {error}")
    more = f", and {len(unusable) - 1} more" if len(unusable) > 1 else ""
    return kept, f"NDAttributes left out: {unusable[0]}{more}" if unusable else ""
