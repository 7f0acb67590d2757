"""An authority of the kind `vault`, as the agent opens it, before a server that stands in for Vault."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from fakes.clocks import HandClock
from fakes.hierarchy import Ca, common_name, make_ca, make_leaf, new_key
from fakes.vault_server import VaultServer

from sds_agent.authority.kind import Context
from sds_agent.authority.protocol import AuthorityError, Issuance, IssueRequest
from sds_agent.authority.vault.client import VaultAuthority
from sds_agent.authority.vault.kind import KIND
from sds_agent.authority.vault.settings import (
    VaultAppRoleAuth,
    VaultAuth,
    VaultCertAuth,
    VaultJwtAuth,
    VaultKubernetesAuth,
    VaultSettings,
    VaultTokenAuth,
)
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted, accept
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, PrivateKey, generate, to_pkcs8_pem

ID = "spiffe://demo.example/web"
HOUR = timedelta(hours=1)
SECRET = "the-secret-id"


class VaultClient:
    """An authority of this kind, as the agent opens it, and what it asks for."""

    def __init__(self, folder: Path, vault: VaultServer, clock: HandClock) -> None:
        self.folder = folder
        self.vault = vault
        self.clock = clock
        self.key: PrivateKey = generate(KeyType.EC_P256)
        self.authority: VaultAuthority
        (folder / "secret-id").write_text(f"{SECRET}\n")
        (folder / "jwt").write_text("a.good.jwt")

    def settings(self, auth: VaultAuth | None = None, **keys: Any) -> VaultSettings:
        (self.folder / "roots.pem").write_bytes(self.vault.http.roots_pem)
        auth = auth or VaultAppRoleAuth(role_id="the-role-id", secret_id_file=self.folder / "secret-id")
        least: dict[str, Any] = {
            "url": (self.vault.http.url,),
            "ca_file": self.folder / "roots.pem",
            "role": "web",
            "auth": auth,
        }
        return VaultSettings(**(least | keys))

    def token_auth(self, **token: Any) -> VaultTokenAuth:
        (self.folder / "token").write_text(self.vault.make_token(**token))
        return VaultTokenAuth(token_file=self.folder / "token")

    def login(self, method: str) -> VaultAuth:
        auths: dict[str, VaultAuth] = {
            "approle": VaultAppRoleAuth(role_id="the-role-id", secret_id_file=self.folder / "secret-id"),
            "jwt": VaultJwtAuth(jwt_file=self.folder / "jwt", role="agent"),
            "kubernetes": VaultKubernetesAuth(jwt_file=self.folder / "jwt", role="agent"),
            "cert": VaultCertAuth(role="agent"),
        }
        return auths[method]

    def certificate(self, ca: Ca, *, subject: x509.Name | None = None, lasts: timedelta = HOUR) -> dict[str, Path]:
        """A client certificate in the files that the keys name."""
        now, key = self.clock.now(), new_key()
        name = common_name("host-1") if subject is None else subject
        leaf = make_leaf(ca, None, key=key, subject=name, not_before=now - 2 * HOUR, not_after=now + lasts)
        (self.folder / "machine.pem").write_bytes(write_pem([leaf]))
        (self.folder / "machine.key").write_bytes(to_pkcs8_pem(key))
        return {"certificate_file": self.folder / "machine.pem", "key_file": self.folder / "machine.key"}

    @asynccontextmanager
    async def open(self, chosen: VaultSettings) -> AsyncIterator["VaultClient"]:
        context = Context("upstream", "demo.example", self.folder / "state", self.clock)
        async with KIND.open(chosen, context) as authority:
            assert isinstance(authority, VaultAuthority)
            self.authority = authority
            yield self

    def request(self, ttl: timedelta = HOUR) -> IssueRequest:
        self.key = generate(KeyType.EC_P256)
        return IssueRequest(SpiffeId.parse(ID), make_csr(self.key, ID), ttl, "request")

    async def answer(self, ttl: timedelta = HOUR) -> Issuance:
        return await self.authority.issue(self.request(ttl))

    async def issue(self, ttl: timedelta = HOUR) -> Accepted:
        answer = await self.answer(ttl)
        return accept(
            answer,
            identity=SpiffeId.parse(ID),
            public_key=self.key.public_key(),
            anchors=(),
            now=self.clock.now(),
        )

    async def refused(self, ttl: timedelta = HOUR) -> AuthorityError:
        with pytest.raises(AuthorityError) as caught:
            await self.issue(ttl)
        assert "\n" not in str(caught.value)
        return caught.value

    async def anchors(self) -> set[x509.Certificate]:
        return set(read_pem(await self.authority.anchors()))


def clients_ca(vault: VaultServer) -> Ca:
    """The CA of client certificates, which the server asks for."""
    now = vault.now()
    ca = make_ca("machines", not_before=now - timedelta(days=1), not_after=now + timedelta(days=1))
    vault.http.trust = (ca.certificate,)
    return ca


async def pass_time(client: VaultClient, time: timedelta) -> None:
    """Let that much time pass for a task that reads the clock every few seconds."""
    await client.clock.asleep()
    client.clock.elapse(time)
