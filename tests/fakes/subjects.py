"""Our own adapters before stand-ins for their CAs, as the conformance suite takes them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fakes.istio_ca import Asked, IstioCa
from sds_agent_proto.istio_pb2 import CertificateResponse

from sds_agent.authority.istio.settings import IstioSettings
from sds_agent.conformance import Address, Subject, SuiteCa
from sds_agent.pki.certificates import write_pem

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


SUBJECTS: tuple[Subject, ...] = (IstioSubject(),)
