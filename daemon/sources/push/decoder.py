"""The process that decodes files which came over a network; `daemon.sources.push.reader` runs it.

Formats are told by their first bytes, not by names, and only those are taken that refer to no other
files.
"""

from __future__ import annotations

import bz2
import logging
import os
import resource
import shutil
import signal
import sys
import zlib
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from grainwatch.push_wire import printable
from pipelines.files import open_images
from pipelines.frame import BadFrame
from pipelines.micrograph.frame_acquisition import ACQUISITION, file_metadata

_CHUNK: Final = 1 << 20
#: A file has a header beside its pixels, and may store them in a larger type than it says.
_UNPACKED_SLACK: Final = 16 << 20
_HDF5: Final = b"\x89HDF\r\n\x1a\n"
_EXTENSIONS: Final = {"tiff": ".tif", "edf": ".edf", "cbf": ".cbf", "npy": ".npy"}
#: Says that the process has loaded what it needs.
READY: Final = b"ready"


class Request(msgspec.Struct, frozen=True):
    """A file to decode; its bytes follow."""

    name: str
    formats: tuple[str, ...]
    max_image_bytes: int


class Reply(msgspec.Struct, frozen=True):
    """The image, whose pixels follow; or the reason why there is none."""

    reason: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = (0, 0)
    metadata: dict[str, Any] = {}


def main() -> None:
    """Decode what comes until nobody is there."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a stop is for the daemon, which finishes its file
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    folder = Path(sys.argv[2])
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    _limit_memory(int(sys.argv[3]))
    longest_s = int(sys.argv[4])
    try:
        connection.send_bytes(READY)
        while True:
            request = msgspec.msgpack.decode(connection.recv_bytes(), type=Request)
            data = connection.recv_bytes()
            signal.alarm(longest_s)  # ends what nobody is left to end
            _answer(connection, request, data, folder)
            signal.alarm(0)
    except (EOFError, OSError):
        pass  # the daemon is gone, or goes
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _limit_memory(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _answer(connection: Connection, request: Request, data: bytes, folder: Path) -> None:
    try:
        pixels, metadata = decode(request, data, folder)
    except BadFrame as error:
        connection.send_bytes(msgspec.msgpack.encode(Reply(reason=printable(str(error)[:1500]))))
    except MemoryError:
        reason = f"{request.name}: cannot be read: it takes more memory than an image may"
        connection.send_bytes(msgspec.msgpack.encode(Reply(reason=reason)))
    else:
        connection.send_bytes(msgspec.msgpack.encode(Reply("", pixels.dtype.str, pixels.shape, metadata)))
        connection.send_bytes(pixels.reshape(-1).view(np.uint8).data)


def decode(request: Request, data: bytes, folder: Path) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """Return the pixels (rows, columns(, 3)), C order, and metadata of a file of one image.

    Parameters
    ----------
    request : Request
    data : bytes
        The file, packed or not.
    folder : Path
        Empty; readers want files.

    Raises
    ------
    BadFrame
        As `FileReader.read`.
    """
    name = request.name
    plain = unpacked(name, data, request.max_image_bytes + _UNPACKED_SLACK)
    kind = format_of(plain)
    if kind == "hdf5":
        raise BadFrame(
            f"{name}: is HDF5, which is not taken over a network because it may refer to other files;"
            " copy it to the daemon's machine and read it there (source 'replay' or 'folder')"
        )
    if kind not in request.formats:
        what = f"is {kind}" if kind else "is of no known image format"
        raise BadFrame(f"{name}: {what}; taken over a network: {', '.join(request.formats)}")
    path = folder / f"image{_EXTENSIONS[kind]}"
    path.write_bytes(plain)
    try:
        images = list(islice(open_images(path, colour=True), 2))
        said = file_metadata(path)
    except BadFrame as error:
        raise BadFrame(str(error).replace(str(path), name)) from error
    finally:
        path.unlink(missing_ok=True)
    if len(images) != 1:
        how_many = "several images" if images else "no image"
        raise BadFrame(f"{name}: holds {how_many}, and a number stands for one")
    (image,) = images
    if image.pixels.nbytes > request.max_image_bytes:
        raise BadFrame(
            f"{name}: image of {image.pixels.nbytes} bytes, the limit is {request.max_image_bytes}"
        )
    metadata = {k: v for k, v in image.metadata.items() if k != "file"}
    if said:
        said[ACQUISITION]["remarks"] = [r.replace(str(path), name) for r in said[ACQUISITION]["remarks"]]
    return image.pixels, {**metadata, **said}


def format_of(data: bytes) -> str:
    """Tell the format from the first bytes: one of those taken, "hdf5", or "" for others.

    >>> format_of(b"MM."), format_of(b"###CBF: VERSION 1.5"), format_of(b"  {")
    ('', 'cbf', 'edf')
    """
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if data.startswith(b"###CBF"):
        return "cbf"
    if data.startswith(b"\x93NUMPY"):
        return "npy"
    if data[:8].lstrip().startswith(b"{"):
        return "edf"
    offset = 0  # behind a block of the user's, whose size is a power of two
    while offset < len(data):
        if data[offset : offset + len(_HDF5)] == _HDF5:
            return "hdf5"
        offset = 2 * offset or 512
    return ""


def unpacked(name: str, data: bytes, limit: int) -> bytes:
    """Return what a file packed by gzip or bzip2 holds, `data` itself if it is not packed.

    Raises
    ------
    BadFrame
        If it is damaged, or holds more than `limit` bytes.
    """
    if data[:2] == b"\x1f\x8b":
        unpacker: Any = zlib.decompressobj(wbits=31)
    elif data[:3] == b"BZh":
        unpacker = bz2.BZ2Decompressor()
    else:
        return data
    plain = bytearray()
    rest = data
    try:
        while not unpacker.eof:
            piece = unpacker.decompress(rest, _CHUNK)
            rest = getattr(unpacker, "unconsumed_tail", b"")
            plain += piece
            if len(plain) > limit:
                raise BadFrame(f"{name}: unpacks to more than {limit} bytes")
            if not piece and not unpacker.eof and not rest:
                raise BadFrame(f"{name}: cannot be unpacked, it is truncated")
    except (zlib.error, OSError, ValueError, EOFError) as error:
        if isinstance(error, BadFrame):
            raise
        raise BadFrame(f"{name}: cannot be unpacked, it is damaged: {error}") from error
    return bytes(plain)


if __name__ == "__main__":
    main()
