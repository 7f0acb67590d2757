"""The configuration files in `envoy/`, with this run's paths and ports in place of the fixed ones."""

import json
from dataclasses import dataclass
from pathlib import Path

from .children import DemoError

SOURCES = Path(__file__).parents[2] / "envoy"
WEB = "spiffe://demo.example/ns/default/sa/web"
BACKEND = "spiffe://demo.example/ns/default/sa/backend"
LONGEST_SOCKET_PATH = 107


@dataclass(frozen=True, slots=True)
class Places:
    """Where this run has its files, all in one directory of its own."""

    directory: Path

    def __post_init__(self) -> None:
        longest = max((self.socket, self.admin("envoy-a")), key=lambda path: len(bytes(path)))
        if len(bytes(longest)) > LONGEST_SOCKET_PATH:
            raise DemoError(f"{longest} is too long for the path of a Unix socket: set TMPDIR to a shorter directory.")

    @property
    def socket(self) -> Path:
        """The agent's socket."""
        return self.directory / "sds.sock"

    def admin(self, node: str) -> Path:
        """The socket of an Envoy's admin interface."""
        return self.directory / f"{node}.admin"


def agent(places: Places, ttl: int) -> Path:
    """Write the agent's configuration; `ttl` is the life of a certificate in seconds."""
    values = {
        "/var/lib/sds-agent": _quoted(places.directory / "state"),
        "/run/sds-agent/sds.sock": _quoted(places.socket),
        "ttl: 24h": f"ttl: {ttl}s",
        "authorities:": "admin: {address: '127.0.0.1:0'}\nauthorities:",
    }
    return _write(places, "agent.yaml", values)


def server(places: Places, upstream_port: int) -> Path:
    """Write Envoy B's configuration. Its listener takes a free port, which the admin interface names."""
    values = {
        **_common(places, "envoy-b", 9902),
        "port_value: 10443": "port_value: 0",
        "port_value: 8080": f"port_value: {upstream_port}",
    }
    return _write(places, "server.yaml", values)


def client(places: Places, upstream_port: int) -> Path:
    """Write Envoy A's configuration. Its listener takes a free port, which the admin interface names."""
    values = {
        **_common(places, "envoy-a", 9901),
        "port_value: 10000": "port_value: 0",
        "port_value: 10443": f"port_value: {upstream_port}",
    }
    return _write(places, "client.yaml", values)


def _common(places: Places, node: str, admin_port: int) -> dict[str, str]:
    admin = _quoted(places.admin(node))
    return {
        "/run/sds-agent/sds.sock": _quoted(places.socket),
        f"socket_address: {{address: 127.0.0.1, port_value: {admin_port}}}": f"pipe: {{path: {admin}}}",
    }


def _quoted(path: Path) -> str:
    return json.dumps(str(path))


def _write(places: Places, name: str, values: dict[str, str]) -> Path:
    text = "\n".join(line for line in (SOURCES / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    for old, new in values.items():
        if old not in text:
            raise DemoError(f"envoy/{name} no longer has {old!r}, which the demonstration replaces: put it back.")
        text = text.replace(old, new)
    path = places.directory / name
    path.write_text(text)
    return path
