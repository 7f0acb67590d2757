"""Which revocation lists a real Envoy uses: those that go out, and no list that is left out here.

Each case is a listener with one list and its CA. A peer who is not revoked shows whether Envoy uses the list: where it
does not, it refuses him.
"""

import base64
import copy
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from fakes import der
from fakes.envoys import BINARY, TYPES, Envoy, bootstrap, holding
from fakes.hierarchy import UNKNOWN, Ca, Extension, key_usage, make_ca, make_crl, make_leaf, new_key
from fakes.oddities.fields import rsa_key
from fakes.processes import started
from msgspec import Struct

from sds_agent.issuance.lists import KnownCas, choose, published
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem

HOUR = timedelta(hours=1)
START = datetime.now(UTC).replace(microsecond=0)
TIMES: dict[str, Any] = {"not_before": START - HOUR, "not_after": START + HOUR}
ROOT = make_ca("root", **TIMES)
SIGNER = make_ca("signer", ROOT, **TIMES)
NAMESAKE = make_ca("signer", ROOT, **TIMES)
NO_LISTS = make_ca("no lists", ROOT, usage=key_usage(cert_sign=True, crl_sign=False), **TIMES)
RSA = make_ca("RSA", ROOT, key=rsa_key(2048), **TIMES)
NO_USAGE = make_ca("no usage", ROOT, usage=None, **TIMES)
NEW = make_ca("new root", **TIMES)
CROSS = make_ca("new root", ROOT, key=NEW.key, usage=key_usage(cert_sign=True, crl_sign=False), **TIMES)
SIGNING_CROSS = make_ca("new root", ROOT, key=NEW.key, **TIMES)
POINT = x509.UniformResourceIdentifier("https://ca.example/crl")
AT_POINT: Extension = (x509.CRLDistributionPoints([x509.DistributionPoint([POINT], None, None, None)]), False)


class Case(Struct, frozen=True):
    """The lists, the CA of the peer's certificate, that certificate's further extensions, the certificate that the peer
    sends of its CA, unless it is the CA's own, and the anchors.
    """

    lists: tuple[x509.CertificateRevocationList, ...]
    ca: Ca = SIGNER
    extra: tuple[Extension, ...] = ()
    sent: Ca | None = None
    anchors: tuple[Ca, ...] = (ROOT,)

    @property
    def above(self) -> x509.Certificate:
        return (self.sent or self.ca).certificate

    @property
    def bundle(self) -> tuple[x509.Certificate, ...]:
        return tuple(anchor.certificate for anchor in self.anchors)


def crl(ca: Ca = SIGNER, *extra: Extension, last: timedelta = -HOUR / 2, **changed: Any) -> Any:
    times = {"last_update": START + last, "next_update": START + HOUR} | changed
    return make_crl(ca, 7, extra=extra, **times)


def scope(**changed: Any) -> Extension:
    names = ("only_contains_user_certs", "only_contains_ca_certs", "indirect_crl", "only_contains_attribute_certs")
    given = {"full_name": None, "relative_name": None, "only_some_reasons": None, **dict.fromkeys(names, False)}
    return x509.IssuingDistributionPoint(**{**given, **changed}), True


def key_of(ca: Ca, *, critical: bool = False) -> Extension:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key()), critical


def name_of(ca: Ca, serial_number: int | None = None) -> Extension:
    issuer = [x509.DirectoryName(ca.certificate.issuer)]
    return x509.AuthorityKeyIdentifier(None, issuer, serial_number or ca.certificate.serial_number), False


def version_1(ca: Ca, *extensions: bytes) -> x509.CertificateRevocationList:
    signer = der.Entity(der.common_name("signer"), ca.key)  # type: ignore[arg-type]  # an EC key
    return x509.load_der_x509_crl(der.revocation_list(signer, [der.revoked(7)], extensions, version=b""))


def by_pss(ca: Ca, salt: int) -> x509.CertificateRevocationList:
    assert isinstance(ca.key, rsa.RSAPrivateKey)
    builder = x509.CertificateRevocationListBuilder(ca.certificate.subject, START - HOUR / 2, START + HOUR)
    return builder.sign(ca.key, SHA256(), rsa_padding=padding.PSS(padding.MGF1(SHA256()), salt))


REASONS = frozenset([x509.ReasonFlags.key_compromise])
CASES = {
    "plain": Case((crl(),)),
    "number": Case((crl(SIGNER, (x509.CRLNumber(3), False)),)),
    "critical number": Case((crl(SIGNER, (x509.CRLNumber(3), True)),)),
    "critical key identifier": Case((crl(SIGNER, key_of(SIGNER, critical=True)),)),
    "key identifier of another": Case((crl(SIGNER, key_of(ROOT)),)),
    "serial number of its CA's certificate": Case(
        (crl(SIGNER, name_of(SIGNER)),),
    ),
    "serial number of another certificate of its CA": Case((crl(SIGNER, name_of(SIGNER, 77)),)),
    "a root that an older one certified": Case((crl(NEW), crl(ROOT)), NEW, sent=CROSS, anchors=(ROOT, NEW)),
    "likewise, and the serial number of the root": Case(
        (crl(NEW, name_of(NEW)), crl(ROOT)), NEW, sent=CROSS, anchors=(NEW, ROOT)
    ),
    "likewise, and that of the older one's certificate": Case(
        (crl(NEW, name_of(SIGNING_CROSS)), crl(ROOT)), NEW, sent=SIGNING_CROSS, anchors=(ROOT, NEW)
    ),
    "likewise, where the older one alone is trusted": Case(
        (crl(NEW, name_of(SIGNING_CROSS)), crl(ROOT)), NEW, sent=SIGNING_CROSS
    ),
    "likewise, and the serial number of the root that is not": Case(
        (crl(NEW, name_of(NEW)), crl(ROOT)), NEW, sent=SIGNING_CROSS
    ),
    "likewise, and no cRLSign in what the peer sends": Case((crl(NEW), crl(ROOT)), NEW, sent=CROSS),
    "version 1": Case((version_1(SIGNER),)),
    "version 1 with an extension": Case((version_1(SIGNER, der.extension(der.CRL_NUMBER, der.integer(1))),)),
    "RSA-PSS": Case((by_pss(RSA, 32),), RSA),
    "RSA-PSS with another salt": Case((by_pss(RSA, 20),), RSA),
    "unknown extension": Case((crl(SIGNER, (UNKNOWN, False)),)),
    "critical unknown extension": Case((crl(SIGNER, (UNKNOWN, True)),)),
    "entry with a reason": Case((crl(entry_extra=[(x509.CRLReason(x509.ReasonFlags.superseded), False)]),)),
    "entry with a critical extension": Case((crl(entry_extra=[(UNKNOWN, True)]),)),
    "delta": Case((crl(SIGNER, (x509.DeltaCRLIndicator(1), True)),)),
    "indirect": Case((crl(SIGNER, scope(indirect_crl=True)),)),
    "user certificates alone": Case((crl(SIGNER, scope(only_contains_user_certs=True)),)),
    "CA certificates alone": Case((crl(SIGNER, scope(only_contains_ca_certs=True)),)),
    "attribute certificates alone": Case((crl(SIGNER, scope(only_contains_attribute_certs=True)),)),
    "some reasons": Case((crl(SIGNER, scope(only_some_reasons=REASONS)),)),
    "distribution point": Case((crl(SIGNER, scope(full_name=[POINT])),)),
    "distribution point that the peer names": Case((crl(SIGNER, scope(full_name=[POINT])),), extra=(AT_POINT,)),
    "without a point, and the peer names one": Case((crl(),), extra=(AT_POINT,)),
    "not valid yet": Case((crl(last=HOUR / 2),)),
    "ended": Case((crl(next_update=START - HOUR / 4),)),
    "by a CA without cRLSign": Case((crl(NO_LISTS),), NO_LISTS),
    "by a CA without key usage": Case((crl(NO_USAGE),), NO_USAGE),
    "by another key": Case((crl(key=new_key()),)),
    "of another CA": Case((crl(ROOT),)),
    "of two CAs of one name": Case(tuple(crl(ca, key_of(ca)) for ca in (SIGNER, NAMESAKE))),
    "of two CAs of one name, in the other order": Case(tuple(crl(ca, key_of(ca)) for ca in (NAMESAKE, SIGNER))),
    "Ed25519": Case((crl(ED := make_ca("Ed25519", ROOT, key=ed25519.Ed25519PrivateKey.generate(), **TIMES)),), ED),
}


USED_AND_LEFT_OUT = "attribute certificates alone"
"""Envoy takes the peer, as the list says nothing of certificates like his: so it is no list to rely on."""


def leaf_of(case: Case) -> tuple[x509.Certificate, Any]:
    key = new_key()
    return make_leaf(case.ca, "spiffe://demo.example/peer", key=key, extra=case.extra, **TIMES), key


def goes_out(case: Case, leaf: x509.Certificate) -> bool:
    known = KnownCas(case.bundle, ((leaf, case.above),), advertised=(NAMESAKE.certificate, SIGNER.certificate))
    return bool(choose(map(published, case.lists), (), known, datetime.now(UTC)).pem)


def inline(data: bytes) -> dict[str, str]:
    return {"inline_bytes": base64.b64encode(data).decode()}


def configuration(directory: Path, server: tuple[x509.Certificate, Any]) -> dict[str, Any]:
    """An Envoy with a listener for each case, which has the lists as the agent gives them.

    They come by LDS from a file: a list that Envoy does not load costs no other case its listener.
    """
    config = bootstrap(directory / "none.sock", directory / "admin.sock", api_type="GRPC", name="none", http={})
    (listener,) = config.pop("static_resources")["listeners"]
    listeners = []
    pair = {"certificate_chain": inline(write_pem([server[0], SIGNER.certificate]))}
    pair["private_key"] = inline(to_pkcs8_pem(server[1]))
    for name, case in CASES.items():
        each = copy.deepcopy(listener)
        each["name"] = name
        context = {
            "trusted_ca": inline(write_pem(case.bundle)),
            "crl": inline(b"".join(published(crl).pem for crl in case.lists)),
            "only_verify_leaf_cert_crl": True,
        }
        tls = each["filter_chains"][0]["transport_socket"]["typed_config"]
        tls["common_tls_context"] = {"tls_certificates": [pair], "validation_context": context}
        listeners.append({"@type": f"{TYPES}.config.listener.v3.Listener", **each})
    file = directory / "lds.json"
    file.write_text(json.dumps({"version_info": "1", "resources": listeners}))
    source = {"resource_api_version": "V3", "path_config_source": {"path": str(file)}}
    return config | {"dynamic_resources": {"lds_config": source}}


async def test_envoy_uses_the_lists_that_go_out_and_refuses_everybody_for_the_others(tmp_path: Path) -> None:
    file = tmp_path / "envoy.json"
    file.write_text(json.dumps(configuration(tmp_path, leaf_of(CASES["plain"]))))
    command = [BINARY, "-c", str(file), "--disable-hot-restart", "--concurrency", "1", "-l", "info"]
    taken, given = {}, {}
    async with started(command) as program:
        proxy = Envoy(program, tmp_path / "admin.sock")
        await proxy.ready()
        at = await proxy.ports()
        for name, case in CASES.items():
            leaf, key = leaf_of(case)
            peer = holding(tmp_path, [leaf, case.above], key, ROOT.certificate)
            taken[name] = name in at and await peer.is_taken(at[name])
            given[name] = goes_out(case, leaf)
    assert given == {**taken, USED_AND_LEFT_OUT: False}
    assert sum(given.values()) >= 10
