"""Keys for an encrypted proxy (CURVE; bluesky 1.15 and later: ServerCurve and ClientCurve)."""

from __future__ import annotations

from pathlib import Path

import zmq
import zmq.auth

from grainwatch.config import ConfigError


def load_keys(secret_file: str, server_file: str, where: str) -> tuple[bytes, bytes, bytes] | None:
    """Return (own public, own secret, server's public) key; None where no files are named.

    The files are those that ``zmq.auth.create_certificates`` writes: NAME.key_secret and NAME.key.

    Raises
    ------
    ConfigError
        Naming the key of the configuration, if only one file is named or one cannot be used.
    """
    if not secret_file and not server_file:
        return None
    if not secret_file or not server_file:
        missing = "curve_server_key" if secret_file else "curve_secret_key"
        raise ConfigError(f"{where}.{missing}: expected a file: an encrypted proxy needs both keys")
    if not zmq.has("curve"):
        raise ConfigError(f"{where}.curve_secret_key: this libzmq was built without CURVE")
    public, secret = _load(secret_file, f"{where}.curve_secret_key")
    if secret is None:
        raise ConfigError(
            f"{where}.curve_secret_key: {secret_file} has no secret key (expected NAME.key_secret)"
        )
    server, _ = _load(server_file, f"{where}.curve_server_key")
    return public, secret, server


def _load(file: str, where: str) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(Path(file))
    except OSError as error:
        raise ConfigError(f"{where}: {file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{where}: {file} is no certificate of ZeroMQ: {error}") from error
