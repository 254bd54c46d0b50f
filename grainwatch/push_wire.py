"""What a sender of images and a daemon say to each other: docs/reference/push.md describes it.

A message is a head in msgpack, one of the structs below, and for an image a second part with its
bytes as they are. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

import msgspec

#: Version of the protocol; a daemon and a sender understand each other only if it is the same.
VERSION: Final = 1
DEFAULT_ADDRESS: Final = "tcp://127.0.0.1:31110"
#: The largest head, in bytes.
MAX_HEAD_BYTES: Final = 64 * 1024
#: What is said of an image (metadata and texts beside it) takes at most so many bytes of msgpack.
MAX_METADATA_BYTES: Final = 24 * 1024
#: Images in one `Held`.
HELD_AT_ONCE: Final = 1000
#: The largest number of an image.
MAX_NUMBER: Final = 2**53

#: Image formats that may come over the network, and how names of such files end.
SUFFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "tiff": (".tif", ".tiff", ".mccd"),
    "edf": (".edf",),
    "cbf": (".cbf",),
    "npy": (".npy",),
}
#: Endings of packed files.
PACKED: Final = (".gz", ".bz2")
#: Endings of texts that belong to the image of the same name.
SIDECARS: Final = (".txt", ".hdr", ".json")

#: No control characters: names are written into logs.
_PLAIN: Final = r"^[^\x00-\x1f\x7f]*\Z"
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=_PLAIN)]
Reason = Annotated[str, msgspec.Meta(max_length=2000)]
Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Digest = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Sha256 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Outcome = Literal["taken", "held", "failed", "refused"]

_T = TypeVar("_T")


class Head(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Common to all heads: the key `type`."""


class Hello(Head, frozen=True, tag="hello"):
    """The first message of a sender. `client` says who it is, to a person."""

    version: int
    client: Annotated[str, msgspec.Meta(max_length=200, pattern=_PLAIN)] = ""


class Welcome(Head, frozen=True, tag="welcome"):
    """The answer to a hello: what the daemon takes."""

    version: int
    stream: str
    program: str
    window: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    max_bytes: int
    formats: tuple[str, ...]


class Begin(Head, frozen=True, tag="begin"):
    """Asks for the turn to send a series.

    `series` is its name. `first` is the number that it starts from. `series_id` goes on with a series
    that was begun before; without it the latest of that name goes on if it is still open. `fresh`
    begins a new one in any case.
    """

    series: Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=_PLAIN)]
    first: Number = 0
    series_id: Annotated[str, msgspec.Meta(max_length=200)] = ""
    fresh: bool = False


class Busy(Head, frozen=True, tag="busy"):
    """The turn is another sender's; `ahead` are before this one. A `Begun` follows when it is its turn."""

    series: str
    client: str
    ahead: int


class HeldImage(msgspec.Struct, frozen=True, array_like=True):
    """An image that the daemon has. `current`: in the series that goes on, not in an earlier one."""

    number: int
    fingerprint: bytes
    current: bool


class Held(Head, frozen=True, tag="held"):
    """Some of the images of that name that need not come again."""

    images: tuple[HeldImage, ...]


class Begun(Head, frozen=True, tag="begun"):
    """The turn is yours, and all that is held has been said. `resumed`: the series was open before."""

    series_id: str
    first: int
    resumed: bool


class ImageHead(Head, frozen=True, tag="image"):
    """An image; its bytes are the second part of the message.

    `id` comes back in the `Ack`. `form` "file": the bytes of a file, named `name`; "array": pixels in
    C order, little-endian, described by `dtype` and `shape` (rows, columns). `fingerprint` tells
    images apart that have the same number. `sidecars` are texts that lay beside the file.
    """

    id: Id
    number: Number
    name: Name
    fingerprint: Digest
    sha256: Sha256
    form: Literal["file", "array"]
    dtype: Annotated[str, msgspec.Meta(max_length=8)] = ""
    shape: tuple[int, ...] = ()
    acquired: float = 0.0
    modified: float = 0.0
    position_um: tuple[float, ...] | None = None
    metadata: dict[str, Any] = {}
    sidecars: dict[str, str] = {}


class Ack(Head, frozen=True, tag="ack"):
    """What became of an image.

    "taken": it is in the daemon's accounts. "held": it was there already. "failed": it is there, as a
    failed frame, because of `reason`. "refused": it is not there, because of `reason`.
    """

    id: Id
    outcome: Outcome
    reason: Reason = ""


class Leave(Head, frozen=True, tag="leave"):
    """Gives the turn back. `end`: the series is complete; without, it may go on later."""

    end: bool


class Left(Head, frozen=True, tag="left"):
    """The answer to a leave, after all that came before it."""


class Refused(Head, frozen=True, tag="refused"):
    """A message cannot be used. `fatal`: nor can what would follow; the daemon forgets the sender."""

    reason: Reason
    fatal: bool = False


class Ping(Head, frozen=True, tag="ping"):
    """Needs no answer: the daemon looks whether a sender is still there."""


FromSender: TypeAlias = Hello | Begin | ImageHead | Leave
FromDaemon: TypeAlias = Welcome | Busy | Held | Begun | Ack | Left | Refused | Ping

_encoder = msgspec.msgpack.Encoder()
_from_sender: msgspec.msgpack.Decoder[FromSender] = msgspec.msgpack.Decoder(FromSender)
_from_daemon: msgspec.msgpack.Decoder[FromDaemon] = msgspec.msgpack.Decoder(FromDaemon)


class BadHead(ValueError):
    """A head that cannot be read; the text says why."""


def pack(head: FromSender | FromDaemon) -> bytes:
    """Return the bytes of a head.

    Raises
    ------
    BadHead
        If something in its metadata is no text, number, list or table.
    """
    try:
        return _encoder.encode(head)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadHead(f"metadata: {error}") from None


def read_from_sender(raw: bytes | memoryview) -> FromSender:
    """Read what a sender says.

    Raises
    ------
    BadHead
        If it is too long, is not msgpack or not one of the heads that senders use.
    """
    return _read(_from_sender, raw)


def read_from_daemon(raw: bytes | memoryview) -> FromDaemon:
    """Read what a daemon says; raises as `read_from_sender`."""
    return _read(_from_daemon, raw)


def _read(decoder: msgspec.msgpack.Decoder[_T], raw: bytes | memoryview) -> _T:
    if len(raw) > MAX_HEAD_BYTES:
        raise BadHead(f"a head of {len(raw)} bytes, the limit is {MAX_HEAD_BYTES}")
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError, ValueError) as error:
        raise BadHead(printable(str(error)[:300])) from None


def printable(text: str) -> str:
    """Return a text that came from elsewhere without what would disturb a log or a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def metadata_error(metadata: Mapping[str, Any], sidecars: Mapping[str, str]) -> str:
    """Say why this cannot be sent beside an image, "" if it can."""
    try:
        size = len(_encoder.encode((metadata, sidecars)))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return f"metadata: {error}"
    if size > MAX_METADATA_BYTES:
        return f"metadata and texts beside the image take {size} bytes, the limit is {MAX_METADATA_BYTES}"
    return ""


def file_fingerprint(name: str, size: int, modified_ns: int) -> bytes:
    """Return what tells versions of a file apart without reading it.

    16 bytes of the sha256 of name, size in bytes and time of modification in ns.
    """
    return hashlib.sha256(f"{name}\0{size}\0{modified_ns}".encode("utf-8", "surrogatepass")).digest()[:16]


def array_fingerprint(sha256: bytes, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return what tells arrays apart: 16 bytes, from the sha256 of their bytes, type and shape."""
    return hashlib.sha256(sha256 + f"\0{dtype}\0{shape}".encode()).digest()[:16]
