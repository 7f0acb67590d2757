"""From exec to the first secret out of the stored state, with each kind of CA configured and none of them there.

    python benchmarks/authorities.py [RUNS]

First an agent with the embedded CA stores a certificate and its bundle, which are then put down to each other kind in
turn, in a state directory of its own, as if that CA had issued them. Agents with these kinds are started in turn while
no CA can be reached: what they serve comes from the disk. Their resident memory is read two seconds later, when those
that ask for anchors have asked, and so have imported their client.
"""

import json
import shutil
import statistics
import tempfile
import time
from base64 import urlsafe_b64encode
from pathlib import Path

from bench.processes import agent_command
from bench.program import numbers
from bench.starts import CONFIG as AGENT
from bench.starts import seconds_to_first_secret
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

KINDS: dict[str, dict[str, object]] = {
    "embedded": {},
    "istio": {"address": "127.0.0.1:1", "ca_file": "roots.pem", "token_file": "token"},
    "step-ca": {"url": "https://127.0.0.1:1", "provisioner": "sds", "ca_file": "roots.pem", "jwk_file": "jwk"},
    "vault": {
        "url": "https://127.0.0.1:1",
        "ca_file": "roots.pem",
        "role": "web",
        "auth": {"type": "token", "token_file": "token"},
    },
    "cfssl": {"url": "https://127.0.0.1:1", "ca_file": "roots.pem"},
    "est": {"url": "https://127.0.0.1:1", "ca_file": "roots.pem", "username": "a", "password_file": "token"},
    "kubernetes": {"kubeconfig": "kubeconfig", "signer_name": "example.com/workloads", "roots_file": "roots.pem"},
    "spiffe": {"socket": "api.sock"},
    "files": {"certificate_file": "none.pem", "key_file": "none.key", "roots_file": "roots.pem"},
}
CONFIG = AGENT.replace("{1}", "true")


def prepare(directory: Path) -> None:
    """Write what the configurations name, and let an agent store a certificate."""
    (directory / "token").write_text("a.token.x")
    key = ec.generate_private_key(ec.SECP256R1())
    numbers = key.private_numbers()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "none.key.pem").write_bytes(pem)
    (directory / "jwk").write_text(json.dumps(_jwk(numbers)))
    config = directory / "embedded.yaml"
    config.write_text(CONFIG.format(directory))
    seconds_to_first_secret(agent_command(config), directory / "agent.sock")
    roots = directory / "state" / "authorities" / "local" / "roots.pem"
    certificates = roots.read_text().split("-----BEGIN CERTIFICATE-----")[1:]
    ends = [f"-----BEGIN CERTIFICATE-----{each.split('-----END CERTIFICATE-----')[0]}" for each in certificates]
    (directory / "roots.pem").write_text("".join(f"{each}-----END CERTIFICATE-----\n" for each in ends))
    cluster = {"server": "https://127.0.0.1:1", "certificate-authority": str(directory / "roots.pem")}
    (directory / "kubeconfig").write_text(
        json.dumps(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
                "clusters": [{"name": "k", "cluster": cluster}],
                "users": [{"name": "u", "user": {"token": "a.token.x"}}],
            }
        )
    )
    for kind, keys in KINDS.items():
        chosen = json.dumps({"local": {"type": kind, **keys}})
        named = CONFIG.format(directory).replace(f"{directory}/state", f"{directory}/state-{kind}")
        (directory / f"{kind}.yaml").write_text(f"{named}authorities: {chosen}\n")
        state = directory / f"state-{kind}"
        shutil.copytree(directory / "state", state)
        for file in (state / "anchors.json", *state.glob("certificates/*.json")):
            text = file.read_text().replace('"kind":"embedded"', f'"kind":"{kind}"')
            file.write_text(text.replace('"authority":"embedded local"', f'"authority":"{kind} local"'))


def _jwk(numbers: ec.EllipticCurvePrivateNumbers) -> dict[str, str]:
    def encoded(number: int) -> str:
        return urlsafe_b64encode(number.to_bytes(32, "big")).decode().rstrip("=")

    public = numbers.public_numbers
    return {
        "kty": "EC",
        "crv": "P-256",
        "kid": "k",
        "x": encoded(public.x),
        "y": encoded(public.y),
        "d": encoded(numbers.private_value),
    }


def main() -> None:
    """Measure and print."""
    (runs,) = numbers(__doc__, runs=(15, 1))
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        prepare(directory)
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        memory: dict[str, float] = {}
        for number in range(runs + 1):
            for kind in KINDS:
                command, socket = agent_command(directory / f"{kind}.yaml"), directory / "agent.sock"

                def settled(pid: int, kind: str = kind) -> None:
                    time.sleep(2)
                    status = Path(f"/proc/{pid}/status").read_text()
                    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
                    memory[kind] = int(resident.split()[1]) / 1024

                then = settled if number == runs else None
                times[kind].append(seconds_to_first_secret(command, socket, then))
    for kind, taken in times.items():
        counted = sorted(taken[1:])
        low, middle, high = counted[0], statistics.median(counted), counted[-1]
        print(f"{kind:11}  min {low:.3f} s  median {middle:.3f} s  max {high:.3f} s  {memory[kind]:.1f} MB after 2 s")


if __name__ == "__main__":
    main()
