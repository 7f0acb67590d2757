"""Addresses that a server of ours listens on, as a configuration has them."""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, TypeAlias

from msgspec import Struct

from sds_agent.configfile.types import UnacceptableError, custom, text


class ListenAddress(Struct, frozen=True):
    """Where to listen: an IP address, or a name that resolves to one, and a port (0 lets the kernel choose)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect to it. Of names only localhost counts."""
        try:
            return ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return self.host == "localhost"


def _address(value: object, _base: Path) -> ListenAddress:
    host, colon, port = text(value).rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isascii() or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise UnacceptableError
    if (":" in host) is not (host.startswith("[") and host.endswith("]")):
        raise UnacceptableError("write an IPv6 address in brackets")
    if not bare:
        raise UnacceptableError("write 0.0.0.0 or [::] to listen on every address")
    if not _can_be_looked_up(bare):
        raise UnacceptableError("a name has 1 to 63 characters between two dots, and no space")
    return ListenAddress(bare, int(port))


def _can_be_looked_up(host: str) -> bool:
    """Whether `socket.getaddrinfo` asks for it: another one it does not take for a name, and raises UnicodeError."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return host.isprintable() and " " not in host


Listen: TypeAlias = Annotated[
    ListenAddress,
    custom(
        _address,
        "an address and a port such as 127.0.0.1:15012",
        {"type": "string", "pattern": r"^(\[[^\[\]\s]+\]|[^\[\]:\s]+):[0-9]+$"},
    ),
]
