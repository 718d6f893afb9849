"""Supervision of workers: how long a silent worker is tolerated."""

from __future__ import annotations

from multiprocessing import Pipe
from types import SimpleNamespace

import pytest

from batch_infer.engines import peers
from batch_infer.engines.peers import Patience, Peer


def test_compilation_before_the_first_sign_does_not_extend_later_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(peers, "time", SimpleNamespace(monotonic=lambda: now))
    connection, other_end = Pipe()
    with connection, other_end:
        peer = Peer(0, connection)
        patience = Patience(load=3600, start=3600, least=600, factor=10)
        peer.ready = True
        peer.begin()
        now = 300.0
        peer.note_sign()
        now = 900.0
        assert peer.silence(patience) is None
        now = 901.0
        assert peer.silence(patience) == 601
        peer.note_sign()  # a regular interval of 601 s does extend it
        now = 901.0 + 6010
        assert peer.silence(patience) is None
        now += 1
        assert peer.silence(patience) == 6011
