"""Our own adapters before stand-ins for their CAs, as the conformance suite takes them."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding
from fakes import cfssl_server, est_server
from fakes.hierarchy import Ca, new_key
from fakes.istio_ca import Asked, IstioCa
from fakes.kubernetes_server import BUNDLES, SIGNER, TOKEN, KubernetesServer, write_kubeconfig
from fakes.step_ca_server import StepCaStandIn, jwe_of, jwk_of
from fakes.vault_server import Issuer, VaultServer
from sds_agent_proto.istio_pb2 import CertificateResponse

from sds_agent.authority.cfssl.settings import CfsslSettings
from sds_agent.authority.est.settings import EstSettings
from sds_agent.authority.istio.settings import IstioSettings
from sds_agent.authority.kubernetes.settings import KubernetesSettings
from sds_agent.authority.step_ca.settings import StepCaSettings
from sds_agent.authority.vault.settings import VaultAppRoleAuth, VaultSettings
from sds_agent.conformance import Address, Subject, SuiteCa
from sds_agent.pki.certificates import write_pem

PASSWORD = b"a long passphrase"
ID = "spiffe://demo.example/ns/default/sa/web"


class IstioSubject:
    """istiod, with a token."""

    kind = "istio"
    http = False
    secrets = ("a.token.x",)
    spiffe_id = ID

    @asynccontextmanager
    async def serving(self, ca: SuiteCa) -> AsyncIterator[Address]:
        istiod = IstioCa()

        def answer(asked: Asked) -> CertificateResponse:
            chain = [*ca.answer(asked.message.csr.encode()), ca.root]
            return CertificateResponse(cert_chain=[write_pem([each]).decode() for each in chain])

        istiod.answer = answer
        async with istiod.serving() as address:
            yield Address(int(address.rpartition(":")[2]), istiod.root_pem)

    def settings(self, address: Address, directory: Path) -> IstioSettings:
        (directory / "roots.pem").write_bytes(address.roots_pem)
        (directory / "token").write_text(self.secrets[0])
        return IstioSettings(
            address=(f"127.0.0.1:{address.port}",), ca_file=directory / "roots.pem", token_file=directory / "token"
        )


class StepCaSubject:
    """step-ca with a JWK provisioner, by the file of its roots."""

    kind = "step-ca"
    http = True
    spiffe_id = ID

    def __init__(self) -> None:
        self._key = new_key()

    @property
    def secrets(self) -> tuple[str, ...]:
        return (PASSWORD.decode(), jwk_of(self._key)["d"])

    @asynccontextmanager
    async def serving(self, ca: SuiteCa) -> AsyncIterator[Address]:
        step = StepCaStandIn()
        step.key = self._key
        step.issue = lambda csr: ca.answer(csr.public_bytes(Encoding.PEM))
        step.roots = [Ca(ca.root, self._key)]  # the key stands for one that is never used
        step.now = lambda: ca.now()  # noqa: PLW0108 - the attribute changes later
        async with step.serving():
            yield Address(step.server.port, step.server.roots_pem)

    def settings(self, address: Address, directory: Path) -> StepCaSettings:
        (directory / "sds.jwe").write_text(jwe_of(json.dumps(jwk_of(self._key)).encode(), PASSWORD))
        (directory / "password").write_bytes(PASSWORD)
        (directory / "roots.pem").write_bytes(address.roots_pem)
        return StepCaSettings(
            url=f"https://127.0.0.1:{address.port}",
            provisioner="sds",
            ca_file=directory / "roots.pem",
            jwk_file=directory / "sds.jwe",
            password_file=directory / "password",
        )


class CfsslSubject:
    """CFSSL, by authsign, with its bundle."""

    kind = "cfssl"
    http = True
    secrets = (cfssl_server.KEY.hex(),)
    spiffe_id = ID

    @asynccontextmanager
    async def serving(self, ca: SuiteCa) -> AsyncIterator[Address]:
        cfssl = cfssl_server.CfsslServer(ca)
        async with cfssl.http.serving():
            yield Address(cfssl.http.port, cfssl.http.roots_pem)

    def settings(self, address: Address, directory: Path) -> CfsslSettings:
        (directory / "roots.pem").write_bytes(address.roots_pem)
        (directory / "hmac").write_text(self.secrets[0])
        return CfsslSettings(
            url=f"https://127.0.0.1:{address.port}",
            ca_file=directory / "roots.pem",
            auth_key_file=directory / "hmac",
            profile="mesh",
            bundle=True,
        )


class KubernetesSubject:
    """An API server with a signer, whose root is in a ClusterTrustBundle."""

    kind = "kubernetes"
    http = True
    secrets = (TOKEN,)
    spiffe_id = ID

    @asynccontextmanager
    async def serving(self, ca: SuiteCa) -> AsyncIterator[Address]:
        async with KubernetesServer(ca.answer).serving() as server:
            server.put(f"{BUNDLES}/roots", {"spec": {"trustBundle": write_pem([ca.root]).decode()}})
            yield Address(server.http.port, server.http.roots_pem)

    def settings(self, address: Address, directory: Path) -> KubernetesSettings:
        url = f"https://127.0.0.1:{address.port}"
        kubeconfig = write_kubeconfig(directory, url, address.roots_pem, token=TOKEN)
        return KubernetesSettings(kubeconfig=kubeconfig, signer_name=SIGNER, trust_bundle="roots")


class VaultSubject:
    """Vault or OpenBao, with an AppRole; the mount has the root, imported, and an intermediate."""

    kind = "vault"
    http = True
    secrets = ("the-secret-id",)
    spiffe_id = ID

    @asynccontextmanager
    async def serving(self, ca: SuiteCa) -> AsyncIterator[Address]:
        vault = VaultServer(now=lambda: ca.now(), sign=ca.answer)  # noqa: PLW0108 - a test exchanges ca.now
        vault.issuers.clear()
        vault.add(Issuer(ca.root))
        vault.add(Issuer(ca.intermediate, new_key(), (ca.root,)))
        async with vault.serving():
            yield Address(vault.http.port, vault.http.roots_pem)

    def settings(self, address: Address, directory: Path) -> VaultSettings:
        (directory / "roots.pem").write_bytes(address.roots_pem)
        (directory / "secret-id").write_text(self.secrets[0])
        return VaultSettings(
            url=(f"https://127.0.0.1:{address.port}",),
            ca_file=directory / "roots.pem",
            role="web",
            auth=VaultAppRoleAuth(role_id="the-role-id", secret_id_file=directory / "secret-id"),
        )


class EstSubject:
    """An EST server, with a password at first."""

    kind = "est"
    http = True
    secrets = (est_server.PASSWORD,)
    spiffe_id = ID

    @asynccontextmanager
    async def serving(self, ca: SuiteCa) -> AsyncIterator[Address]:
        est = est_server.EstServer(ca)
        async with est.http.serving():
            yield Address(est.http.port, est.http.roots_pem)

    def settings(self, address: Address, directory: Path) -> EstSettings:
        (directory / "roots.pem").write_bytes(address.roots_pem)
        (directory / "password").write_text(self.secrets[0])
        return EstSettings(
            url=f"https://127.0.0.1:{address.port}",
            ca_file=directory / "roots.pem",
            username=est_server.USER,
            password_file=directory / "password",
        )


SUBJECTS: tuple[Subject, ...] = (
    IstioSubject(),
    StepCaSubject(),
    CfsslSubject(),
    EstSubject(),
    KubernetesSubject(),
    VaultSubject(),
)
