"""The configuration of a daemon: one TOML file, every key with a type and a default.

The tables of a plug-in (source, pipeline, sink) are checked against the plug-in's own ``Config``
struct, so a new detector brings its keys with it. Errors name the key and what was expected.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_type_hints

import msgspec

_WORDS = {
    "array": "a list [...]",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "object": "a table",
    "str": 'a text in quotes "..."',
}
"""How a message calls the types that the checker names."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what was expected."""


class Table(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A table of the configuration: unknown keys are errors."""


class DaemonTable(Table, frozen=True, kw_only=True):
    """``[daemon]``: who it is and where it keeps things.

    Relative paths, here and in every other table, count from the folder of the configuration file.

    Attributes
    ----------
    name : str
        How it signs its results.
    state_dir : str
        Holds the ledger and the frames that killed a worker; one daemon a folder.
    runtime_dir : str
        Holds the control socket.
    workers : int
        Processes that compute; 0 computes inside the front process.
    start_timeout_s : float
        A worker that takes longer to get ready is killed and started again; the first start of an
        installation compiles.
    compute_timeout_s : float
        A worker that computes longer at one batch is killed.
    stop_timeout_s : float
        A stop computes what has been received for at most so long and drops the rest.
    ledger_days : float
        The ledger forgets a series so many days after its end.
    quarantine : int
        How many frames that killed a worker are kept.
    """

    name: str = "grainwatch"
    state_dir: str = "state"
    runtime_dir: str = "run"
    workers: int = 2
    start_timeout_s: float = 300.0
    compute_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0
    ledger_days: float = 90.0
    quarantine: int = 20


class RingTable(Table, frozen=True, kw_only=True):
    """``[ring]``: shared memory between the front process and the workers.

    Attributes
    ----------
    slots : int
        Frames on their way to the workers.
    slot_bytes : int
        Room for one frame as it came, compressed; only the pages that frames touch cost memory.
    """

    slots: int = 16
    slot_bytes: int = 32 * 1024 * 1024


class EnginesTable(Table, frozen=True, kw_only=True):
    """``[engines]``: what runs the networks of model bundles.

    Attributes
    ----------
    backend : str
        "auto" takes the best that works here: TensorRT on a GPU (tensorrt, else tensorrt-rtx), ONNX
        Runtime on a GPU, ONNX Runtime on the CPU. Any other is taken or the start refused.
    precision : str
        "auto" takes what the bundle was found to be best with; any other is used where the answers
        stay within what the bundle allows.
    """

    backend: Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime", "openvino"] = (
        "auto"
    )
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"


class ModelsTable(Table, frozen=True, kw_only=True):
    """``[models]``: how models are exchanged while the daemon runs.

    Attributes
    ----------
    probation_frames : int
        A new model has to serve so many frames before the old one is let go; an error meanwhile puts
        the old one back.
    shadow_share : float
        Part of the frames that a model in the shadow computes too.
    shadow_kept : int
        Comparisons kept of each model in the shadow, the latest.
    """

    probation_frames: int = 50
    shadow_share: float = 0.1
    shadow_kept: int = 5000


Policy = Literal["block", "drop-oldest", "drop-newest", "decimate"]


class EdgeTable(Table, frozen=True, kw_only=True):
    """A bounded edge: how many items it holds and what happens when it is full.

    Attributes
    ----------
    policy : str
        "block" waits (the detector's own buffer fills), "drop-oldest" and "drop-newest" drop and
        count, "decimate" lets every `keep_every`-th frame through and blocks when full.
    depth : int
        How many items wait at most.
    mib : int
        How many MiB they take together at most, for what is large: uncompressed frames. One item
        always finds room.
    keep_every : int
        For "decimate".
    """

    policy: Policy = "block"
    depth: int = 64
    mib: int = 256
    keep_every: int = 1

    def __post_init__(self) -> None:
        for key in ("depth", "mib", "keep_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected 1 or more, got {getattr(self, key)}")


class ScanTable(Table, frozen=True, kw_only=True):
    """``[streams.NAME.scan]``: the grid that the frames of a series walk over.

    Attributes
    ----------
    shape : list of int
        Points along x, y and z; x is fastest. One to three numbers.
    step_um : list of float
        Distance of the points; with it, frames that bring coordinates are placed by these.
    snake : bool
        Every second line runs backwards.
    origin_um : list of float
        Coordinates of the point where the grid begins. Without it the first frame that comes tells
        them, whose own point its number gives: not enough for a scan that jumps about.
    """

    shape: tuple[int, ...]
    step_um: tuple[float, ...] = ()
    snake: bool = False
    origin_um: tuple[float, ...] = ()


class StreamTable(Table, frozen=True, kw_only=True):
    """``[streams.NAME]``: a source, the pipeline its frames go through, and how they queue.

    Attributes
    ----------
    source : table
        A `type` and what that source may be told.
    pipeline : table
        A `type` and what that pipeline may be told.
    intake : table
        The edge between the source and the workers.
    scan : table
        Without it the stream has a map only where its source brings the grid of each scan.
    """

    source: dict[str, Any]
    pipeline: dict[str, Any]
    intake: EdgeTable = EdgeTable()
    scan: ScanTable | None = None


class Config(Table, frozen=True, kw_only=True):
    """The whole file. `sinks` maps a sink's type to its table."""

    streams: dict[str, StreamTable]
    daemon: DaemonTable = DaemonTable()
    ring: RingTable = RingTable()
    engines: EnginesTable = EnginesTable()
    models: ModelsTable = ModelsTable()
    sinks: dict[str, dict[str, Any]] = {}


def read_config(path: Path) -> tuple[Config, str]:
    """Read a configuration file.

    Returns
    -------
    config : Config
    config_hash : str
        sha256 of the file's bytes, as results carry it.

    Raises
    ------
    ConfigError
        If the file is absent, is not TOML, or a key is unknown or of the wrong type.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_config(raw, str(path))


def parse_config(raw: bytes, where: str) -> tuple[Config, str]:
    """As `read_config`, for the bytes of a file; `where` leads the errors."""
    try:
        table = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: is not TOML: {error}") from error
    streams = table.get("streams")
    if isinstance(streams, dict):
        # One by one: the checker's own path would not say which stream it is.
        for name, stream in streams.items():
            convert(stream, StreamTable, f"{where}: streams.{name}")
    config = convert(table, Config, where)
    _check_values(config, where)
    return config, hashlib.sha256(raw).hexdigest()


def convert(table: Any, kind: type[Any], where: str) -> Any:
    """Check a table against a struct; `where` ("FILE", "FILE: streams.laue.source") leads the error."""
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `")
        key = path.rstrip("`").removeprefix("$").removeprefix(".")
        if what.startswith("Invalid enum value"):
            given = what.removeprefix("Invalid enum value ")
            what = f"{given} is not known{_choices(kind, key, given)}"
        elif unknown := re.fullmatch("Object contains unknown field `(.*)`", what):
            what = f"unknown key `{unknown[1]}`{_known_keys(kind, key, unknown[1])}"
        elif missing := re.fullmatch("Object missing required field `(.*)`", what):
            what = f"the key `{missing[1]}` is missing"
        else:
            what = _in_plain_words(what)
        at = where if not key else f"{where}.{key}" if ": " in where else f"{where}: {key}"
        raise ConfigError(f"{at}: {what}") from error


def _choices(kind: Any, key: str, given: str) -> str:
    """Return what may stand at a key ("intake.policy"), for an error, where the type lists it."""
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if isinstance(kind, type) else None
    choices = get_args(kind)
    if not choices:
        return ""
    listed = ", ".join(map(repr, choices))
    meant = did_you_mean(given.strip("'"), map(str, choices))
    return f"{meant} Expected one of {listed}" if meant else f", expected one of {listed}"


def _known_keys(kind: Any, key: str, given: str) -> str:
    """Return the keys of the table at `key` ("intake"), the one most like `given` first, for an error."""
    for part in filter(None, key.split(".")):
        kind = get_type_hints(kind).get(part) if isinstance(kind, type) else None
        # An optional table is a union with None.
        kind = next((k for k in get_args(kind) if isinstance(k, type) and issubclass(k, Table)), kind)
    if not (isinstance(kind, type) and issubclass(kind, Table)):
        return ""
    keys = kind.__struct_fields__
    meant = did_you_mean(given, keys)
    return f"{meant} Known keys: {', '.join(keys)}" if meant else f"; known keys: {', '.join(keys)}"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return ": did you mean X?" with the known name most like the given one, "" when none is like it.

    >>> did_you_mean("adress", ["address", "name"])
    ': did you mean address?'
    """
    by_lower_case = {name.lower(): name for name in known}
    like = difflib.get_close_matches(given.lower(), by_lower_case, n=1, cutoff=0.6)
    return f": did you mean {by_lower_case[like[0]]}?" if like else ""


def _in_plain_words(what: str) -> str:
    """Return the checker's "Expected `array`, got `str`" with the names that a TOML file's writer knows."""
    if not what.startswith("Expected `"):
        return what
    words = re.sub(
        r"`([^`]*)`", lambda m: " or ".join(_WORDS.get(k, k) for k in m[1].split(" | ") if k != "null"), what
    )
    words = words.replace("a whole number, got a number", "a whole number, got one with a decimal point")
    return words[0].lower() + words[1:]


def load_plugin(group: str, name: str, where: str) -> ModuleType:
    """Import the plug-in that the entry-point group ``grainwatch.<group>`` registers under `name`.

    A name with a dot in it ("lab.our_detector") is the module itself: a plug-in of one's own
    needs no registration, only to lie on ``PYTHONPATH``.
    """
    if "." in name:
        try:
            return import_module(name)
        except ImportError as error:
            raise ConfigError(f"{where}: module {name!r} cannot be imported: {error}") from error
    found = {e.name: e for e in entry_points(group=f"grainwatch.{group}")}
    if name not in found:
        known = ", ".join(sorted(found)) or "none (is the full distribution installed?)"
        raise ConfigError(f"{where}: {name!r} is not a known type; known: {known}")
    try:
        module = found[name].load()
    except ImportError as error:
        raise ConfigError(f"{where}: {name!r} cannot be imported: {error}") from error
    assert isinstance(module, ModuleType)
    return module


def plugin_config(group: str, table: dict[str, Any], where: str) -> tuple[ModuleType, Any]:
    """Resolve a table with a ``type`` key: the plug-in's module and its checked ``Config``."""
    name = table.get("type")
    if not isinstance(name, str):
        raise ConfigError(f"{where}: type: expected the name of a {group.removesuffix('s')}, as a string")
    module = load_plugin(group, name, f"{where}.type")
    rest = {k: v for k, v in table.items() if k != "type"}
    return module, convert(rest, module.Config, where)


def _check_values(config: Config, where: str) -> None:
    checks = [
        (
            0 < len(config.daemon.name) <= 64
            and re.search(r"[\x00-\x1f\x7f/\\]", config.daemon.name) is None,
            f"daemon.name: expected 1 to 64 characters without slashes, got {config.daemon.name!r}",
        ),
        (config.daemon.workers >= 0, "daemon.workers: expected 0 or more"),
        (config.daemon.start_timeout_s > 0, "daemon.start_timeout_s: expected more than 0"),
        (config.daemon.compute_timeout_s > 0, "daemon.compute_timeout_s: expected more than 0"),
        (config.daemon.stop_timeout_s >= 0, "daemon.stop_timeout_s: expected 0 or more"),
        (config.daemon.ledger_days > 0, "daemon.ledger_days: expected more than 0"),
        (config.daemon.quarantine >= 0, "daemon.quarantine: expected 0 or more"),
        (
            config.models.probation_frames >= 0,
            f"models.probation_frames: expected 0 or more, got {config.models.probation_frames}",
        ),
        (
            0 <= config.models.shadow_share <= 1,
            f"models.shadow_share: expected 0 to 1, got {config.models.shadow_share:g}",
        ),
        (
            config.models.shadow_kept >= 1,
            f"models.shadow_kept: expected 1 or more, got {config.models.shadow_kept}",
        ),
        (config.ring.slots >= 2, "ring.slots: expected 2 or more"),
        (config.ring.slot_bytes >= 4096, "ring.slot_bytes: expected 4096 or more"),
        (bool(config.streams), "streams: expected at least one [streams.NAME] table"),
    ]
    for name, stream in config.streams.items():
        at = f"streams.{name}"
        checks += [
            (name.replace("-", "").replace("_", "").isalnum(), f"{at}: a name of letters, digits, - and _"),
        ]
        if stream.scan is not None:
            shape, step = stream.scan.shape, stream.scan.step_um
            checks += [
                (
                    1 <= len(shape) <= 3 and min(shape, default=0) >= 1,
                    f"{at}.scan.shape: expected 1 to 3 positive whole numbers, got {list(shape)}",
                ),
                (
                    not step or len(step) == len(shape),
                    f"{at}.scan.step_um: expected {len(shape)} numbers, one for each axis of shape",
                ),
                (
                    not stream.scan.origin_um or len(stream.scan.origin_um) == len(step),
                    f"{at}.scan.origin_um: expected {len(shape)} numbers, and step_um beside it",
                ),
            ]
    for good, message in checks:
        if not good:
            raise ConfigError(f"{where}: {message}")
