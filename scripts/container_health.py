"""HEALTHCHECK of the image: exit 0 while the agent or the CA server in the container works.

The image runs either of them, on any file; the command of the container's first process says which.
"""

import socket
import ssl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

USUAL = "/etc/sds-agent/sds-agent.yaml"
TIMEOUT = 3.0
HEADER = 9
"""Octets of a frame's header; the fourth is its type (RFC 9113, section 4.1)."""
SETTINGS = 4
"""The type of the frame with which a server opens every connection (RFC 9113, section 3.4)."""


def main() -> int:
    """Ask the agent, by `sds-agent ready`, or the CA."""
    arguments = command(Path("/proc/1/cmdline").read_text().split("\0"))
    if arguments[:2] == ["ca", "serve"]:
        return ask_ca(Path(*place(arguments)))
    done = subprocess.run(["sds-agent", "ready", *place(arguments)], check=False)
    return 1 if done.returncode else 0  # Docker reserves 2, the code for a file that cannot be used


def command(words: Sequence[str]) -> list[str]:
    """The arguments of sds-agent, which an interpreter or an init may precede; the image's own if it is not found."""
    names = [Path(word).name for word in words]
    return list(words[names.index("sds-agent") + 1 :]) if "sds-agent" in names else ["run", USUAL]


def place(arguments: Sequence[str]) -> list[str]:
    """Where it serves, as `sds-agent ready` has it: the socket that `run` was given, or else the file."""
    path, file = option(arguments, "--socket"), option(arguments, "--config")
    if path is not None:
        return ["--socket", path]
    return [file] if file is not None else [each for each in arguments if Path(each).is_file()][:1]


def option(arguments: Sequence[str], name: str) -> str | None:
    """What an option was given, as a word of its own or behind an equals sign; None where it was not given."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        given, equals, value = word.partition("=")
        if given == name:
            return value if equals else following
    return None


def ask_ca(file: Path) -> int:
    """0 if gRPC answers behind the CA's TLS. The CA is in this container, so its certificate is not checked."""
    from sds_agent.ca.settings import load  # noqa: PLC0415 - the agent's check does without

    listen = load(file).listen
    try:
        opening = first_frame(listen.host, listen.port)
    except OSError as error:
        print(f"the CA does not answer at {listen}: {error}")
        return 1
    if len(opening) < HEADER or opening[3] != SETTINGS:
        print(f"what answers at {listen} does not speak gRPC")
        return 1
    return 0


def first_frame(host: str, port: int) -> bytes:
    """The header of what the server says first. Raises OSError."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), TIMEOUT) as connection,
        context.wrap_socket(connection) as tls,
    ):
        return tls.recv(HEADER)


if __name__ == "__main__":
    sys.exit(main())
