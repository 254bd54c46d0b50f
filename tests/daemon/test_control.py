from __future__ import annotations

import json
import os
import resource
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from testkit.process import eventually

from daemon.control import MAX_CLIENTS, ControlServer
from grainwatch.commands.status import ask
from grainwatch.config import ConfigError


def refuse(request: Any) -> dict[str, Any]:
    raise ValueError("limit: expected a number")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ControlServer]:
    server = ControlServer(
        tmp_path / "control.sock",
        {"status": lambda r: {"echo": r.get("word")}, "refuse": refuse, "break": lambda r: {"x": 1 // 0}},
    )
    server.start()
    yield server
    server.close()


def say(path: Path, *lines: bytes) -> list[dict[str, Any]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(b"".join(lines))
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as replies:
            return [json.loads(line) for line in replies]


def test_a_command_is_answered_on_one_line(server: ControlServer) -> None:
    assert ask(server.path, {"command": "status", "word": "ä\n"}) == {"ok": True, "echo": "ä\n"}


def test_the_socket_is_for_the_group_only(server: ControlServer) -> None:
    assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o660


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"garbage\n", "not a line of JSON"),
        (b"\xff\xfe\x00\n", "not a line of JSON"),
        (b"[" * 50_000 + b"\n", "not a line of JSON"),
        (b"[1]\n", "with one of: break, refuse, status"),
        (b'{"command": "fly"}\n', "got {'command': 'fly'}"),
        (b'{"command": ["status"]}\n', "with one of"),
        (b'{"command": "refuse"}\n', "limit: expected a number"),
        (b'{"command": "break"}\n', "ZeroDivisionError"),
        (b"x" * 70_000 + b"\n", "longer than"),
    ],
)
def test_garbage_gets_an_error_and_harms_nobody(server: ControlServer, line: bytes, error: str) -> None:
    (reply, *_) = say(server.path, line)
    assert not reply["ok"]
    assert error in reply["error"]
    assert ask(server.path, {"command": "status"})["ok"]


def test_several_requests_on_one_connection(server: ControlServer) -> None:
    replies = say(
        server.path, b'{"command": "status", "word": 1}\n', b"?\n", b'{"command": "status", "word": 2}\n'
    )
    assert [r.get("echo") for r in replies] == [1, None, 2]


def test_clients_do_not_wait_for_each_other_and_are_bounded(server: ControlServer) -> None:
    idle = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(MAX_CLIENTS - 1)]
    for client in idle:
        client.connect(str(server.path))
    assert ask(server.path, {"command": "status"})["ok"]
    for client in idle:
        client.close()
    # Their places are free when the server has noticed.
    eventually(lambda: not any(thread.name == "control-client" for thread in threading.enumerate()))
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(server.path, {"command": "status"})))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 5


def test_a_client_that_cannot_be_accepted_is_not_the_last(
    server: ControlServer, caplog: pytest.LogCaptureFixture
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(60.0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 1, limit[1]))
        try:
            with ExitStack() as held:
                with suppress(OSError):
                    while True:
                        held.enter_context(open(os.devnull))
                client.connect(str(server.path))
                eventually(lambda: "cannot be served: [Errno 24]" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        client.sendall(b'{"command": "status"}\n')
        assert json.loads(client.recv(1000)) == {"ok": True, "echo": None}


def test_a_socket_of_a_dead_daemon_is_replaced_and_a_live_one_respected(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(path))
    dead.close()
    first = ControlServer(path, {"status": lambda r: {}})
    first.start()
    with pytest.raises(ConfigError, match="another daemon answers at"):
        ControlServer(path, {})
    assert ask(path, {"command": "status"})["ok"]
    first.close()
    assert not path.exists()


def test_a_path_that_no_socket_can_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runtime_dir: the socket .* cannot be made"):
        ControlServer(tmp_path / ("x" * 120) / "control.sock", {})


def test_nobody_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no daemon listens at .*control\.sock"):
        ask(tmp_path / "control.sock", {"command": "status"})


def test_who_asks_a_daemon_that_ends_is_told_so(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
        daemon.bind(str(tmp_path / "control.sock"))
        daemon.listen(1)

        def end() -> None:
            client, _ = daemon.accept()
            with client:
                client.recv(4096)

        ends = threading.Thread(target=end)
        ends.start()
        with pytest.raises(ConfigError, match="broke the connection off before it answered; has it ended"):
            ask(tmp_path / "control.sock", {"command": "status"})
        ends.join()
