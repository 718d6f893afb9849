"""Connect workers on other machines to the supervisor over TCP. Both ends prove that they know a key."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from threading import Thread, Timer

import msgspec

from batch_infer.engines.handle import shut_down
from batch_infer.engines.messages import Hello, decode_from_worker

HANDSHAKE_SECONDS = 30.0
"""Maximum number of seconds to connect, and then to prove at both ends that the key is known."""
HELLO_BYTES = 256

Admit = Callable[[int, Connection], bool]
"""Takes the number in a worker's Hello and its connection, and returns False to refuse the worker."""


def listen_everywhere(family: int = socket.AF_INET) -> socket.socket:
    """Listen on all interfaces, for IPv6 too if possible, at a free port. Raises OSError."""
    is_dual = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", 0), family=socket.AF_INET6 if is_dual else family, dualstack_ipv6=is_dual, backlog=128
    )


def accept_workers(listener: socket.socket, key: bytes, admit: Admit) -> None:
    """Accept workers that know the key, in background, until the listener is closed."""
    Thread(target=_accept_all, args=(listener, key, admit), daemon=True).start()


def _accept_all(listener: socket.socket, key: bytes, admit: Admit) -> None:
    while listener.fileno() != -1:  # until the listener is closed
        with suppress(OSError):  # the other end or the listener was closed
            connection = Connection(listener.accept()[0].detach())
            # On its own thread, since a silent connection must not block others.
            Thread(target=_admit, args=(connection, key, admit), daemon=True).start()


def _admit(connection: Connection, key: bytes, admit: Admit) -> None:
    try:
        with _handshake_timeout(connection):
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            message = decode_from_worker(connection.recv_bytes(HELLO_BYTES))
        if isinstance(message, Hello) and admit(message.rank, connection):
            return
    except (AuthenticationError, EOFError, OSError, msgspec.DecodeError):
        pass
    connection.close()


def dial_in(host: str, port: int, key: bytes) -> Connection | None:
    """Return a connection to the supervisor, or None if it does not respond or does not know the key.

    Raises socket.gaierror if the host cannot be resolved.
    """
    connection = None
    try:
        end = socket.create_connection((host, port), HANDSHAKE_SECONDS)
        end.settimeout(None)
        connection = Connection(end.detach())
        with _handshake_timeout(connection):  # another server may have taken the port of a killed supervisor
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
    except socket.gaierror:
        raise
    except (OSError, EOFError, AuthenticationError):
        if connection is not None:
            connection.close()
        return None
    return connection


@contextmanager
def _handshake_timeout(connection: Connection) -> Iterator[None]:
    """Shut down the connection if the handshake inside the context takes longer than HANDSHAKE_SECONDS."""
    timer = Timer(HANDSHAKE_SECONDS, shut_down, (connection,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
