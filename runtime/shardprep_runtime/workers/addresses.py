"""Find and judge addresses: where a front end may serve, and by which address of its own a host is seen."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from ..errors import InputError, quote

ANY_PORT: Final = 9

SIOCGIFADDR: Final = 0x8915
"""Linux's number of the question for the address of a network interface."""


def parse_address(text: str) -> tuple[str, int]:
    """host:port, or [IPv6 address]:port. Raises InputError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"{quote(text)} is not an address; write host:port, as the front end prints it")
    return host, int(port)


def check_host(host: str, *, allow_public: bool) -> tuple[socket.AddressFamily, str]:
    """Family and address of a host.

    Args:
        host: A name, or an address.
        allow_public: Let it be one that the Internet may reach.

    Raises:
        InputError: Where the host is not known, or the Internet may reach it.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"{quote(host)}: no such host: {error.strerror}") from None
    addresses: Sequence[str] = [str(each[4][0]).partition("%")[0] for each in found]
    for text in addresses:
        address = ipaddress.ip_address(text)
        if not allow_public and (address.is_global or address.is_unspecified):
            what = "all addresses of this machine" if address.is_unspecified else "a public address"
            raise InputError(
                f"{quote(host)}: {what}; whoever reaches the port can disturb the workers: serve at a private "
                "address of this machine, or say --allow-public where a firewall keeps others out"
            )
    return found[0][0], addresses[0]


def default_host() -> str:
    """The address of this machine within its private network; loopback where it has none. Nothing is sent."""
    for network in ("10.255.255.255", "192.168.255.255", "172.31.255.255"):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((network, 9))
            found = str(probe.getsockname()[0])
            if ipaddress.ip_address(found).is_private:
                return found
    return "127.0.0.1"


def address_towards(host: str, port: int = ANY_PORT) -> str:
    """The address of this machine by which another host sees it. Nothing is sent.

    Args:
        host: Name or address of the other one.
        port: Any: it is only asked which way would be taken.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface that has this address of this machine; None where that cannot be said (IPv6)."""
    import fcntl

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        wanted = socket.inet_aton(address)
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # one without an address
                asked = struct.pack("256s", name.encode()[:15])
                if fcntl.ioctl(probe.fileno(), SIOCGIFADDR, asked)[20:24] == wanted:
                    return name
    return None
