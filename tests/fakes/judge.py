"""A real Envoy that judges many certificate chains in one start: which bundles it loads, which chains it loads as its
own, and whom it lets in.

Each case has a listener of its own. They come by LDS from a file, since Envoy takes or refuses each of those by itself:
a bundle or a chain that it does not load costs no other case anything.
"""

import json
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from anyio.streams.tls import TLSStream
from fakes import der
from fakes.envoys import BINARY, TYPES, Envoy
from fakes.processes import started

TLS = f"{TYPES}.extensions.transport_sockets.tls.v3"


@dataclass(frozen=True)
class Case:
    """The chain that a peer presents, and the anchors that Envoy has; all in DER."""

    label: str
    leaf: bytes
    above: tuple[bytes, ...]
    anchors: tuple[bytes, ...]
    key: der.Key = field(repr=False)
    spiffe_id: str

    @property
    def chain_pem(self) -> bytes:
        return b"".join(map(der.pem, (self.leaf, *self.above)))

    @property
    def anchors_pem(self) -> bytes:
        return b"".join(map(der.pem, self.anchors))


@dataclass(frozen=True)
class Question:
    """A chain with its key, which a client and the Envoy itself have, and the bundle that Envoy has, both in PEM."""

    identity: bytes
    bundle: bytes


class Judge:
    """A running Envoy with one listener a question."""

    def __init__(self, envoy: Envoy, directory: Path) -> None:
        self._envoy = envoy
        self._directory = directory

    async def loaded(self) -> set[str]:
        """The names whose bundle Envoy took, and whose chain it took as its own."""
        listeners = await self._envoy.admin("/listeners?format=json")
        return {each["name"] for each in listeners["listener_statuses"]}

    async def lets_in(self, name: str) -> bool:
        """Whether the question's peer is let in.

        Raises ssl.SSLError where the client's own OpenSSL does not go along: it reads neither every chain that it is to
        present, nor every name of an anchor that a server sends.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = (
            ssl.TLSVersion.TLSv1_2
        )  # in TLS 1.2 the client learns the verdict within the handshake
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.load_cert_chain(self._directory / f"{name}.pem")
        connection = await anyio.connect_unix(self._directory / f"{name}.sock")
        async with connection:
            try:
                await TLSStream.wrap(connection, server_side=False, ssl_context=context, standard_compatible=False)
            except (ssl.SSLError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
                cause = error.__cause__ or error
                if isinstance(cause, ssl.SSLError) and "ALERT" not in str(cause.reason) and "EOF" not in str(cause):
                    raise cause from None
                return False
        return True

    async def reasons(self) -> dict[str, str]:
        """Envoy's log lines by name, as far as they are written."""
        log = (self._directory / "access.log").read_text(errors="replace")
        return dict(re.findall(r"^(\S+) (.+)$", log, re.MULTILINE))


@asynccontextmanager
async def judging(questions: Mapping[str, Question], directory: Path) -> AsyncIterator[Judge]:
    """Run an Envoy that can be asked every question by its name."""
    server = der.entity("server")
    certificate = der.certificate(
        server, extensions=der.leaf_extensions(server, server, "spiffe://demo.example/server")
    )
    own = {
        "certificate_chain": {"inline_string": der.pem(certificate).decode()},
        "private_key": {"inline_string": der.key_pem(server.key).decode()},
    }
    listeners = []
    for name, question in questions.items():
        (directory / f"{name}.pem").write_bytes(question.identity)
        listeners.append(_listener(name, question, own, directory))
    (directory / "lds.json").write_text(json.dumps({"version_info": "1", "resources": listeners}))
    admin, file = directory / "admin.sock", directory / "envoy.json"
    bootstrap = {
        "node": {"id": "judge", "cluster": "tests"},
        "admin": {"address": {"pipe": {"path": str(admin)}}},
        "dynamic_resources": {
            "lds_config": {"resource_api_version": "V3", "path_config_source": {"path": str(directory / "lds.json")}}
        },
    }
    file.write_text(json.dumps(bootstrap))
    command = [BINARY, "-c", str(file), "--disable-hot-restart", "--concurrency", "1", "-l", "info"]
    command += ["--file-flush-interval-msec", "50"]
    async with started(command) as program:
        envoy = Envoy(program, admin)
        await envoy.ready()
        yield Judge(envoy, directory)


def _listener(name: str, question: Question, own: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Clients get Envoy's `own` certificate, as their OpenSSL does not read every chain; that is there to be loaded."""
    pair = {"inline_string": question.identity.decode()}
    words = f"{name} %DOWNSTREAM_TRANSPORT_FAILURE_REASON%\n"
    access_log = {
        "@type": f"{TYPES}.extensions.access_loggers.file.v3.FileAccessLog",
        "path": str(directory / "access.log"),
        "log_format": {"text_format_source": {"inline_string": words}},
    }
    return {
        "@type": f"{TYPES}.config.listener.v3.Listener",
        "name": name,
        "address": {"pipe": {"path": str(directory / f"{name}.sock")}},
        "filter_chains": [
            _filter_chain(own, question.bundle),
            {
                "filter_chain_match": {"server_names": ["nobody.example"]},
                **_filter_chain({"certificate_chain": pair, "private_key": pair}, question.bundle),
            },
        ],
        "access_log": [{"name": "file", "typed_config": access_log}],
    }


def _filter_chain(certificate: dict[str, Any], bundle: bytes) -> dict[str, Any]:
    tls = {
        "@type": f"{TLS}.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": {
            "tls_certificates": [certificate],
            "validation_context": {"trusted_ca": {"inline_string": bundle.decode()}},
        },
    }
    echo = {"name": "echo", "typed_config": {"@type": f"{TYPES}.extensions.filters.network.echo.v3.Echo"}}
    return {"transport_socket": {"name": "tls", "typed_config": tls}, "filters": [echo]}
