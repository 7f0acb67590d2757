"""Directories with a plugged-in CA as other tools make them: the real openssl, easy-rsa and cfssl."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from fakes.hierarchy import Ca
from fakes.openssl import openssl

from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import PrivateKey, to_pkcs8_pem
from sds_agent.signing.directory import Contents, read_directory

EASYRSA = Path("/usr/share/easy-rsa/easyrsa")
CA_EXTENSIONS = "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n"
LEAF_WITH_CA_TRUE = (
    "basicConstraints=CA:true\nkeyUsage=digitalSignature,keyEncipherment\nextendedKeyUsage=serverAuth\n"
    "subjectAltName=URI:spiffe://demo.example/ns/default/sa/web\n"
)


def contents(directory: Path) -> Mapping[str, bytes]:
    """The files in a directory that no process changes meanwhile."""
    read = read_directory(directory)
    assert isinstance(read, Contents)
    return read.files


def files_of(signer: Ca, *above: Ca) -> dict[str, bytes]:
    """The files of a signer of `fakes.hierarchy`, with the CAs above it, the root last."""
    assert isinstance(signer.key, PrivateKey)
    chain = [signer.certificate, *(ca.certificate for ca in above)]
    return {
        "ca-cert.pem": write_pem(chain[:1]),
        "ca-key.pem": to_pkcs8_pem(signer.key),
        "cert-chain.pem": write_pem(chain),
        "root-cert.pem": write_pem(chain[-1:]),
    }


def write(directory: Path, files: Mapping[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def run(directory: Path, *command: str, environment: Mapping[str, str] | None = None) -> bytes:
    """The output of a program, which has to succeed."""
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(command, cwd=directory, capture_output=True, check=False, env=env)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout


def by_openssl(directory: Path, *, extensions: str = CA_EXTENSIONS, days: int = 730) -> Path:
    """A root and an intermediate, as the pages with openssl commands make them."""
    directory.mkdir(exist_ok=True)
    new_key = ["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
    (directory / "ca.ext").write_text(extensions)
    openssl(directory, *new_key, "-out", "root-key.pem")
    openssl(
        directory,
        *("req", "-x509", "-new", "-key", "root-key.pem", "-subj", "/O=demo.example", "-days", "3650"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign", "-out", "root-cert.pem"),
    )
    openssl(directory, *new_key, "-out", "ca-key.pem")
    openssl(directory, "req", "-new", "-key", "ca-key.pem", "-subj", "/O=demo.example/CN=cluster1", "-out", "ca.csr")
    openssl(
        directory,
        *("x509", "-req", "-in", "ca.csr", "-CA", "root-cert.pem", "-CAkey", "root-key.pem", "-CAcreateserial"),
        *("-days", str(days), "-extfile", "ca.ext", "-out", "ca-cert.pem"),
    )
    chain = (directory / "ca-cert.pem").read_bytes() + (directory / "root-cert.pem").read_bytes()
    (directory / "cert-chain.pem").write_bytes(chain)
    return directory


def by_easyrsa(directory: Path) -> Path:
    """A root by easy-rsa, and a sub-CA that it signed; the certificates have a text before their PEM."""
    directory.mkdir(exist_ok=True)
    options = {"EASYRSA_BATCH": "1", "EASYRSA_ALGO": "ec", "EASYRSA_CURVE": "prime256v1"}

    def easyrsa(pki: str, *arguments: str) -> None:
        run(directory, str(EASYRSA), f"--pki-dir={directory / pki}", *arguments, environment=options)

    for pki in ("root", "sub"):
        easyrsa(pki, "init-pki")
    easyrsa("root", "--req-cn=Root", "build-ca", "nopass")
    easyrsa("sub", "--req-cn=Sub", "build-ca", "nopass", "subca")
    easyrsa("root", "import-req", str(directory / "sub/reqs/ca.req"), "sub")
    easyrsa("root", "sign-req", "ca", "sub")
    root = (directory / "root/ca.crt").read_bytes()
    signer = (directory / "root/issued/sub.crt").read_bytes()
    key = (directory / "sub/private/ca.key").read_bytes()
    files = {"ca-cert.pem": signer, "ca-key.pem": key, "root-cert.pem": root, "cert-chain.pem": signer + root}
    return write(directory / "cacerts", files)


def by_cfssl(directory: Path, algorithm: str = "ecdsa", size: int = 256) -> Path:
    """A root by cfssl, and an intermediate that it signed."""
    directory.mkdir(exist_ok=True)
    key = {"algo": algorithm, "size": size}
    config = {"signing": {"default": {"expiry": "8760h", "usages": ["cert sign", "crl sign"]}}}
    config["signing"]["default"]["ca_constraint"] = {"is_ca": True, "max_path_len": 0, "max_path_len_zero": True}  # type: ignore[assignment]  # a JSON document
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("root", "sub"):
        (directory / f"{name}.json").write_text(json.dumps({"CN": name, "key": key, "names": [{"O": "demo.example"}]}))
    root = json.loads(run(directory, "cfssl", "gencert", "-initca", "root.json"))
    write(directory, {"root.pem": root["cert"].encode(), "root-key.pem": root["key"].encode()})
    signed = ("-ca=root.pem", "-ca-key=root-key.pem", "-config=config.json")
    sub = json.loads(run(directory, "cfssl", "gencert", *signed, "sub.json"))
    certificate, above = sub["cert"].encode(), root["cert"].encode()
    files = {"ca-cert.pem": certificate, "ca-key.pem": sub["key"].encode(), "root-cert.pem": above}
    return write(directory / "cacerts", {**files, "cert-chain.pem": certificate + above})
