"""What the author of an adapter gives to the suite."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from sds_agent.authority.kind import AuthoritySettings
from sds_agent.conformance.suite_ca import SuiteCa


class Address(Struct, frozen=True):
    """Where a server is, on 127.0.0.1, and what vouches for its certificate, in PEM. The certificate is for 127.0.0.1
    and localhost.
    """

    port: int
    roots_pem: bytes


class Subject(Protocol):
    """An adapter, as the suite sees it."""

    @property
    def kind(self) -> str:
        """The name that a configuration gives as `type`."""
        ...

    @property
    def http(self) -> bool:
        """Whether the CA speaks HTTP/1.1 over TLS. Others get the faults of TCP and TLS alone."""
        ...

    @property
    def secrets(self) -> Sequence[str]:
        """What the adapter shows to its CA and must not show to anybody else: tokens and passwords."""
        ...

    @property
    def spiffe_id(self) -> str:
        """The identity that the agent asks for."""
        ...

    def serving(self, ca: SuiteCa) -> AbstractAsyncContextManager[Address]:
        """A CA of the kind, over TLS on loopback, while the context is open.

        It answers every good request with `ca.answer(csr_pem)`, in the form of its own protocol, and where its
        protocol has a place for trust anchors it advertises `ca.root`.
        """
        ...

    def settings(self, address: Address, directory: Path) -> AuthoritySettings:
        """The settings that lead to a CA at this address. Files that they name are written to the directory."""
        ...
