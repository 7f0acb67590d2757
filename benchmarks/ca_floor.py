"""A stand-in for a CA: a bare grpc.aio server with gRPC's own TLS that signs each request with `cryptography`.

    python benchmarks/ca_floor.py DIRECTORY KIND

It asks for no proof, counts nothing and writes no audit log: what it costs is the least that a Python program needs to
read a CSR, check its signature, build a certificate and sign it. KIND is the kind of its key. It puts its root into
DIRECTORY/roots.pem and says where it listens as `ca serve` does.
"""

import asyncio
import json
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio
from bench.leaf import BOTH_ENDS, KEY_USAGE
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from sds_agent_proto.istio_pb2 import CertificateRequest, CertificateResponse

SERVICE, METHOD = "istio.v1.auth.IstioCertificateService", "CreateCertificate"
URI = "spiffe://demo.example/ns/default/sa/web"
LIFETIME = timedelta(hours=1)
ISSUER = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "demo.example")])

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def signed(
    signer: Key, key: PublicKey, extensions: Iterable[tuple[x509.ExtensionType, bool]], name: x509.Name
) -> x509.Certificate:
    """A certificate below the root."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(ISSUER)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=2))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(signer, hashes.SHA256())


async def serve(directory: Path, signer: Key) -> None:
    """Answer until ended."""
    constraints = x509.BasicConstraints(ca=True, path_length=None)
    root = signed(signer, signer.public_key(), [(constraints, True)], ISSUER)
    roots = root.public_bytes(Encoding.PEM)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    usages = x509.ExtendedKeyUsage(BOTH_ENDS)
    no_ca = x509.BasicConstraints(ca=False, path_length=None)

    def leaf(key: PublicKey, name: x509.GeneralName) -> bytes:
        names = x509.SubjectAlternativeName([name])
        extensions = ((names, True), (no_ca, True), (KEY_USAGE, True), (usages, False), (authority, False))
        return signed(signer, key, extensions, x509.Name([])).public_bytes(Encoding.PEM)

    async def create(data: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        csr = x509.load_pem_x509_csr(CertificateRequest.FromString(data).csr.encode())
        key = csr.public_key()
        assert csr.is_signature_valid
        assert isinstance(key, PublicKey)
        chain = [leaf(key, x509.UniformResourceIdentifier(URI)).decode(), roots.decode()]
        return CertificateResponse(cert_chain=chain).SerializeToString()

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {METHOD: grpc.unary_unary_rpc_method_handler(create)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    own = ec.generate_private_key(ec.SECP256R1())
    pem = own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    credentials = grpc.ssl_server_credentials([(pem, leaf(own.public_key(), x509.DNSName("localhost")))])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    (directory / "roots.pem").write_bytes(roots)
    print(json.dumps({"event": "listening", "address": f"127.0.0.1:{port}"}), file=sys.stderr, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    of_rsa = sys.argv[2] == "rsa-2048"
    made = rsa.generate_private_key(65537, 2048) if of_rsa else ec.generate_private_key(ec.SECP256R1())
    asyncio.run(serve(Path(sys.argv[1]), made))
