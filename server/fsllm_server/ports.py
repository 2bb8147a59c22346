"""Whether a port can be opened, in the system's own words."""

import socket


def try_port(host: str, port: int) -> None:
    """Bind a port and let it go.

    Args:
        host: A name or an address; IPv6 may stand in brackets.
        port: 0 for any.

    Raises:
        OSError: Why it can not be opened.

    """
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
