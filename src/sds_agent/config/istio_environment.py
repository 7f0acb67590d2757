"""The variables that Istio's pilot-agent reads, for an agent that is started with no file where CA_ADDR is set.

Names, defaults and meanings are pilot-agent's. With a file the agent ignores all of them: what a file says must not
depend on variables that were set for another program.
"""

from collections.abc import Mapping
from typing import Any

from sds_agent.configfile.document import Document, Origin, working_directory
from sds_agent.configfile.environment import PREFIX
from sds_agent.configfile.phrases import KeyPath, quoted, render
from sds_agent.errors import Problem
from sds_agent.identity.spiffe import SpiffeIdError, TrustDomain, is_segment

_TRUST_DOMAIN = "cluster.local"
_ROOTS = "/var/run/secrets/istio/root-cert.pem"
_ISTIOD = "istiod.istio-system.svc"  # whom pilot-agent expects behind a port that is forwarded
_TOKEN = "/var/run/secrets/tokens/istio-token"  # noqa: S105 - the place of a token, not a token
_NAME = "istio"
_AUTHORITY: KeyPath = ("authorities", _NAME)
_WORKLOAD: KeyPath = ("workloads", 0)
_IDENTITY: KeyPath = (*_WORKLOAD, "spiffe_id")
_LEAST_RATIO, _MOST_RATIO = 0.2, 0.8
_PARTS = ("POD_NAMESPACE", "SERVICE_ACCOUNT")

# Variables whose text is a key's value as it stands.
_AS_IT_STANDS: Mapping[str, KeyPath] = {
    "CA_ADDR": (*_AUTHORITY, "address"),
    "CA_ROOT_CA": (*_AUTHORITY, "ca_file"),
    "PROV_CERT": (*_AUTHORITY, "provisioned"),
    "ISTIO_META_CLUSTER_ID": (*_AUTHORITY, "cluster_id"),
    "ISTIO_META_CERT_SIGNER": (*_AUTHORITY, "cert_signer"),
    "TRUST_DOMAIN": ("trust_domain",),
    "SECRET_TTL": (*_WORKLOAD, "ttl"),
    "OUTPUT_CERTS": (*_WORKLOAD, "output"),
}


def document(environ: Mapping[str, str]) -> tuple[Document, list[Problem]]:
    """The configuration that the variables make, with what is wrong with them. An empty one counts as not set."""
    reading = _IstioVariables({name: value for name, value in environ.items() if value})
    reading.put_as_they_stand()
    reading.put_defaults()
    reading.put_key()
    reading.put_renewal()
    reading.put_identity()
    return reading.document, reading.problems


class _IstioVariables:
    """One pass over the variables."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.problems: list[Problem] = []
        self.document = Document(
            tree={"authorities": {_NAME: {"type": "istio"}}, "workloads": [{"name": "default"}]},
            origins={(): Origin("the environment, as Istio has it")},
            base=working_directory(),
        )

    def put_as_they_stand(self) -> None:
        """The variables whose text is a key's value."""
        for name, path in _AS_IT_STANDS.items():
            if name in self._environ:
                self._put(path, self._environ[name], name)

    def put_defaults(self) -> None:
        """pilot-agent's defaults for the variables that are not set."""
        if "TRUST_DOMAIN" not in self._environ:
            self._default(("trust_domain",), _TRUST_DOMAIN)
        plaintext = self._ours("AUTHORITIES__ISTIO__PLAINTEXT_LOOPBACK") == "true"
        if "CA_ROOT_CA" not in self._environ and not plaintext:  # without TLS there are no roots to name
            provisioned = self._environ.get("PROV_CERT")
            self._default((*_AUTHORITY, "ca_file"), f"{provisioned}/root-cert.pem" if provisioned else _ROOTS)
        elif self._environ.get("CA_ROOT_CA") == "SYSTEM":
            fix = "name the file with the CA's roots: with the system's, every public CA could act as this one"
            self._refuse("CA_ROOT_CA", (*_AUTHORITY, "ca_file"), fix)
        self._default((*_AUTHORITY, "token_file"), _TOKEN)
        if "localhost" in self._environ.get("CA_ADDR", "").rpartition(":")[0]:
            self._default((*_AUTHORITY, "server_name"), _ISTIOD)

    def put_key(self) -> None:
        """The kind of key: RSA 2048 by default."""
        path = (*_WORKLOAD, "key")
        algorithm = self._environ.get("ECC_SIGNATURE_ALGORITHM")
        if algorithm is None:
            sizes = {"2048": "rsa-2048", "3072": "rsa-3072", "4096": "rsa-4096"}
            self._choose("WORKLOAD_RSA_KEY_SIZE", path, sizes, "2048")
        elif algorithm == "ECDSA":
            self._choose("ECC_CURVE", path, {"P256": "ec-p256", "P384": "ec-p384"}, "P256")
        else:
            self._refuse("ECC_SIGNATURE_ALGORITHM", path, "it must be ECDSA, or not set for RSA")

    def put_renewal(self) -> None:
        """When to renew: Istio counts the share of the lifetime that is left, the key the share that has passed."""
        name, path = "SECRET_GRACE_PERIOD_RATIO", ("renewal", "fraction")
        written = self._environ.get(name)
        if written is None:
            return
        try:
            ratio = float(written)
        except ValueError:
            ratio = -1.0
        if not _LEAST_RATIO <= ratio <= _MOST_RATIO:
            allowed = f"a number from {_LEAST_RATIO} to {_MOST_RATIO}"
            self._refuse(name, path, f"it must be {allowed}: the share of a lifetime that is left at the renewal")
            return
        self._put(path, round(1 - ratio, 6), name)

    def put_identity(self) -> None:
        """The SPIFFE ID: the CA signs the one that the token names, and the agent has to know it beforehand."""
        if self._ours("WORKLOADS__0__SPIFFE_ID") is not None:
            return
        trust_domain = self._environ.get("TRUST_DOMAIN", _TRUST_DOMAIN)
        if not _is_trust_domain(trust_domain):  # a problem of the key trust_domain, and reported there
            trust_domain = _TRUST_DOMAIN
        namespace, account = (self._part(name) for name in _PARTS)
        self._put(_IDENTITY, f"spiffe://{trust_domain}/ns/{namespace}/sa/{account}", _PARTS[1])
        self.document.variables.append(_PARTS[0])

    def _part(self, name: str) -> str:
        """What the variable adds to the identity.

        For a value that cannot be a part, the problem is noted and a word takes its place, so that the rest is read.
        """
        written = self._environ.get(name)
        whole = "the identity asked for is spiffe://TRUST_DOMAIN/ns/POD_NAMESPACE/sa/SERVICE_ACCOUNT"
        if written is None:
            fix = f"set it, or unset CA_ADDR, which makes Istio's variables count: {whole}"
            self.problems.append(Problem((f"${name}",), "needs a value", fix, render(_IDENTITY)))
        elif not is_segment(written):
            self._refuse(name, _IDENTITY, f"it must be of a-z, A-Z, 0-9, '.', '-' and '_': {whole}")
        else:
            return written
        return "unknown"

    def _ours(self, key: str) -> str | None:
        """The value of our own variable for a key, if there is one."""
        names = {name.upper(): value for name, value in self._environ.items()}
        return names.get(f"{PREFIX}{key}")

    def _choose(self, name: str, path: KeyPath, among: Mapping[str, str], default: str) -> None:
        written = self._environ.get(name, default)
        if written not in among:
            self._refuse(name, path, f"it must be one of {', '.join(among)}")
        elif name in self._environ:
            self._put(path, among[written], name)
        else:
            self._default(path, among[written])

    def _refuse(self, name: str, path: KeyPath, fix: str) -> None:
        found = f"is {quoted(self._environ[name])}"
        self.problems.append(Problem((f"${name}",), found, fix, render(path)))

    def _put(self, path: KeyPath, value: object, name: str) -> None:
        self.document.variables.append(name)
        self._set(path, value, Origin(f"${name}", is_variable=True))

    def _default(self, path: KeyPath, value: object) -> None:
        self._set(path, value, Origin("pilot-agent's defaults"))

    def _set(self, path: KeyPath, value: object, origin: Origin) -> None:
        *parents, last = path
        inner: Any = self.document.tree
        for part in parents:
            inner = inner[part] if isinstance(part, int) else inner.setdefault(part, {})
        inner[last] = value
        self.document.origins[path] = origin


def _is_trust_domain(name: str) -> bool:
    try:
        TrustDomain.parse(name)
    except SpiffeIdError:
        return False
    return True
