"""What the demonstration says before it begins and after it has ended."""

from pathlib import Path
from shlex import quote

from .files import Places

PICTURE = """\
    requests --> Envoy A ====== mutual TLS =====> Envoy B --> a small server
                    \\                              /
                     `---- SDS ---- sds-agent ----'      (one agent, with a CA of its own)
"""

SHOWN = (
    "openssl s_client -connect 127.0.0.1:{} </dev/null 2>/dev/null | openssl x509 -noout -serial -dates "
    "-ext subjectAltName"
)
"""What prints the certificate that an Envoy presents at a port."""

FIGURES = """\
    identity                  the SPIFFE ID in the Envoy's certificate
    certificates on the wire  serial numbers that a TLS client saw it present, in order
    rotations                 how often that certificate changed
    pushes                    secrets that the agent sent to it
    accepted / rejected       its answers (ACK, NACK), and how long it took to accept
    requests                  those sent through both Envoys, each with a whole TLS handshake between them
"""


def before(ttl: int, seconds: int, rotations: int) -> str:
    """What will happen."""
    return f"""\
What happens now:

{PICTURE}
The agent gives each Envoy a certificate that lives {ttl} s, and replaces it about every {ttl // 2} s. For {seconds} s
requests go through both Envoys. None may fail, and Envoy B's certificate has to change {rotations} times.

The table shows for each Envoy:
{FIGURES}"""


def by_hand(places: Places, port_a: int, port_b: int, command: Path) -> str:
    """Commands for a try by hand while everything runs."""
    agent = quote(str(command))
    socket = quote(str(places.socket))
    return f"""\
Everything goes on until Ctrl-C. To try by hand, in another terminal:

  curl http://127.0.0.1:{port_a}/
  {SHOWN.format(port_b)}
  {agent} status --socket {socket}
  {agent} secret --socket {socket}
  {agent} secret --socket {socket} --envoy {quote(str(places.admin("envoy-b")))} --diff
  {agent} explain backend --socket {socket} --envoy envoy-b
"""


def after(command: Path) -> str:
    """What to do next."""
    agent = quote(str(command))
    return f"""\
Next steps:
  scripts/demo --keep                       the same, and it stays for a try by hand
  {agent} run                    an agent of your own; it says how an Envoy is connected to it
  {agent} envoy-config default   the Envoy configuration for it
  README.md                                 from there on
"""
