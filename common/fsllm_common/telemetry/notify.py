"""Telling systemd (or whoever set NOTIFY_SOCKET) how a daemon fares: sd_notify(3) in a dozen lines."""

import os
import socket
from contextlib import suppress


def notify(state: str) -> None:
    """Send e.g. ``READY=1`` or ``STOPPING=1``. Nothing happens when nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A listener that is gone is no reason to stop working.
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        # A name that begins with @ is in Linux's abstract namespace, where it begins with a zero byte.
        sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
