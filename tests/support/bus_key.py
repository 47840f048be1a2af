"""The bus key of this test run: its processes find it by themselves, and its own buses here."""

from __future__ import annotations

import os
from typing import Any

import zmq

from common.settings.config import BusSettings, RedisSettings
from common.wire.bus_setup import complete


def lock(socket: Any, *, listens: bool = False) -> None:
    """Give a bare ZeroMQ socket the key of this run: what it says is heard by the buses."""
    secret = bus_settings().secret_key.encode()
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    if listens:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
    else:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(secret))
        socket.setsockopt(zmq.CURVE_SERVERKEY, zmq.curve_public(secret))


def bus_settings(**fields: Any) -> BusSettings:
    """Settings of a bus that those of the other processes let in."""
    return complete(BusSettings(**fields), RedisSettings(), os.environ)
