"""Our client with the whole istiod, unchanged; the Kubernetes behind istiod is a stand-in."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fakes.ca_servers import TRUST_DOMAIN, WEB
from fakes.clocks import HandClock
from fakes.events import recorded
from fakes.hierarchy import make_ca, make_leaf, new_key
from fakes.istio_parts import ISTIOD, add_root, istiod, plugged, signer_of
from fakes.kubernetes import WEB_POD, ZTUNNEL, Kubernetes

from sds_agent.authority.istio.client import IstioAuthority
from sds_agent.authority.istio.settings import IstioSettings
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind, Issuance, IssueRequest
from sds_agent.clock import SystemClock
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import accept
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, PrivateKey, generate, to_pkcs8_pem

DAY = timedelta(days=1)


@dataclass
class Caller:
    """A client of the istiod at `address`, and the key that it asks for."""

    folder: Path
    address: str
    key: PrivateKey = field(default_factory=lambda: generate(KeyType.EC_P256))

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    def show(self, token: str | None) -> None:
        """Have that token from now on, or none."""
        self.token_file.unlink(missing_ok=True)
        if token is not None:
            self.token_file.write_text(token)

    def authority(self, *, clock: Any = None, **options: Any) -> IstioAuthority:
        files = {"token_file": self.token_file, "ca_file": self.folder / "roots.pem", "server_name": ISTIOD}
        return IstioAuthority(IstioSettings(address=(self.address,), **{**files, **options}), clock or SystemClock())

    def request(self, uri: str = WEB, ttl: timedelta = DAY, current: CurrentIdentity | None = None) -> IssueRequest:
        return IssueRequest(SpiffeId.parse(uri), make_csr(self.key, uri), ttl, "0" * 32, current)

    def taken(self, issuance: Issuance) -> CurrentIdentity:
        """The certificate, if it passes every check of ours, with what is above it."""
        identity, key, now = SpiffeId.parse(WEB), self.key.public_key(), datetime.now(UTC)
        accepted = accept(issuance, identity=identity, public_key=key, anchors=(), now=now)
        return CurrentIdentity(write_pem(accepted.chain), to_pkcs8_pem(self.key))

    async def refused(self, request: IssueRequest, **options: Any) -> AuthorityError:
        with pytest.raises(AuthorityError) as caught:
            await self.authority(**options).issue(request)
        return caught.value


@asynccontextmanager
async def serving(folder: Path, cluster: Kubernetes, directory: Path, **environment: str) -> AsyncIterator[Caller]:
    """An istiod on that directory, and a client that has a good token and its roots."""
    async with istiod(folder, cluster, directory, environment=environment) as running:
        (folder / "roots.pem").write_bytes(running.roots)
        caller = Caller(folder, running.address)
        caller.show(cluster.issuer.token("RS256"))  # istiod takes no other
        yield caller


# What is asked, and what comes back


@pytest.mark.parametrize("signer", ["ec-p256", "rsa-2048"])
async def test_istiod_signs_for_ec_and_rsa_keys(tmp_path: Path, cluster: Kubernetes, signer: str) -> None:
    async with serving(tmp_path, cluster, plugged(tmp_path, signer)) as caller:
        for kind in (KeyType.EC_P256, KeyType.RSA_2048):
            caller.key = generate(kind)
            issuance = await caller.authority().issue(caller.request())
            chain = read_pem(caller.taken(issuance).chain_pem)
            assert issuance.anchors_pem == (tmp_path / "cluster1/root-cert.pem").read_bytes()
            assert chain[1:] == read_pem((tmp_path / "cluster1/ca-cert.pem").read_bytes())
            assert chain[0].not_valid_after_utc - datetime.now(UTC) > DAY - timedelta(minutes=1)


async def test_the_agent_gets_a_certificate_of_an_istiod_with_a_root_of_its_own(
    tmp_path: Path, cluster: Kubernetes
) -> None:
    async with serving(tmp_path, cluster, tmp_path / "nothing") as caller:
        issuance = await caller.authority().issue(caller.request())
        assert len(read_pem(caller.taken(issuance).chain_pem)) == 1
        assert read_pem(issuance.anchors_pem or b"") == read_pem((tmp_path / "roots.pem").read_bytes())


async def test_the_agent_gets_a_certificate_however_istiods_files_are_written(
    tmp_path: Path, cluster: Kubernetes
) -> None:
    """Text around the certificates, the chain in disorder and with its root, several roots, no newline at the end."""
    directory = plugged(tmp_path)
    add_root(tmp_path, directory)
    own, root = (directory / "ca-cert.pem").read_bytes(), (tmp_path / "root/root-cert.pem").read_bytes()
    (directory / "cert-chain.pem").write_bytes(b"Subject: O=demo\n" + own + b"some words\n" + root.strip())
    roots = (directory / "root-cert.pem").read_bytes()
    (directory / "root-cert.pem").write_bytes(b"# the roots\n" + roots.replace(b"\n", b"\r\n").strip())
    async with serving(tmp_path, cluster, directory) as caller:
        issuance = await caller.authority().issue(caller.request())
        assert read_pem(caller.taken(issuance).chain_pem)[1:] == read_pem(own)
        assert set(read_pem(issuance.anchors_pem or b"")) == set(read_pem(roots))


async def test_a_named_signer_changes_nothing_at_an_istiod_with_one(tmp_path: Path, cluster: Kubernetes) -> None:
    async with serving(tmp_path, cluster, plugged(tmp_path)) as caller:
        caller.taken(await caller.authority(cert_signer="clusterissuers.x").issue(caller.request()))


async def test_a_lifetime_over_90_days_is_refused_and_90_days_are_not(tmp_path: Path, cluster: Kubernetes) -> None:
    async with serving(tmp_path, cluster, plugged(tmp_path)) as caller:
        caller.taken(await caller.authority().issue(caller.request(ttl=90 * DAY)))
        error = await caller.refused(caller.request(ttl=90 * DAY + timedelta(seconds=1)))
    assert error.kind is ErrorKind.INVALID
    assert "Istio's CAs accept at most 90d" in str(error)


async def test_a_certificate_for_another_than_the_agents_workload_is_not_taken(
    tmp_path: Path, cluster: Kubernetes
) -> None:
    """istiod goes by the token, whatever the CSR asks for."""
    async with serving(tmp_path, cluster, plugged(tmp_path)) as caller:
        caller.show(cluster.issuer.token("RS256", sub="system:serviceaccount:default:other"))
        issuance = await caller.authority().issue(caller.request())
    with pytest.raises(AuthorityError) as caught:
        caller.taken(issuance)
    assert caught.value.kind is ErrorKind.MISMATCH
    assert "spiffe://demo.example/ns/default/sa/other" in str(caught.value)


# Who asks


async def test_a_certificate_of_istiod_renews_without_a_token(tmp_path: Path, cluster: Kubernetes) -> None:
    async with serving(tmp_path, cluster, plugged(tmp_path)) as caller:
        current = caller.taken(await caller.authority().issue(caller.request()))
        caller.show(None)
        caller.key = generate(KeyType.EC_P256)
        caller.taken(await caller.authority().issue(caller.request(current=current)))
        error = await caller.refused(caller.request())
    assert error.kind is ErrorKind.UNAUTHENTICATED


async def test_a_foreign_certificate_gives_way_to_the_token(tmp_path: Path, cluster: Kubernetes) -> None:
    now, key = datetime.now(UTC), new_key()
    stranger = make_ca("stranger", not_before=now - DAY, not_after=now + DAY)
    leaf = make_leaf(stranger, WEB, key=key, not_before=now - DAY, not_after=now + DAY)
    foreign = CurrentIdentity(write_pem([leaf, stranger.certificate]), to_pkcs8_pem(key))
    async with serving(tmp_path, cluster, plugged(tmp_path)) as caller:
        with recorded() as events:
            caller.taken(await caller.authority().issue(caller.request(current=foreign)))
    (reported,) = events.named("certificate_not_taken")
    assert reported["status"] == "UNAVAILABLE"


async def test_a_certificate_that_has_expired_for_istiod_alone_gives_way_to_the_token(
    tmp_path: Path, cluster: Kubernetes
) -> None:
    """Our clock is an hour behind."""
    async with serving(tmp_path, cluster, plugged(tmp_path)) as caller:
        now, key = datetime.now(UTC), new_key()
        signer = signer_of(tmp_path / "cluster1")
        leaf = make_leaf(signer, WEB, key=key, not_before=now - DAY, not_after=now - timedelta(minutes=30))
        current = CurrentIdentity(write_pem([leaf, signer.certificate]), to_pkcs8_pem(key))
        clock = HandClock(now - timedelta(hours=1))
        with recorded() as events:
            caller.taken(await caller.authority(clock=clock).issue(caller.request(current=current)))
    assert [reported["status"] for reported in events.named("certificate_not_taken")] == ["UNAVAILABLE"]


@pytest.mark.parametrize(
    "wrong",
    [{"aud": ["another"]}, {"exp": 1}, {"iss": "https://another"}, {"sub": "web"}],
    ids=["audience", "expired", "issuer", "subject"],
)
async def test_the_error_for_a_wrong_token_names_the_token(
    tmp_path: Path, cluster: Kubernetes, wrong: dict[str, Any]
) -> None:
    async with serving(tmp_path, cluster, plugged(tmp_path)) as caller:
        written = cluster.issuer.token("RS256", **wrong)
        caller.show(written)
        error = await caller.refused(caller.request())
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert "check the token's audience (istio-ca) and age, and cluster_id" in str(error)
    assert written not in str(error)


async def test_a_token_counts_in_its_own_cluster(tmp_path: Path, cluster: Kubernetes) -> None:
    """Reviewed by Kubernetes, as istiod has it where no key set is configured."""
    async with serving(tmp_path, cluster, plugged(tmp_path)) as caller:
        caller.show(WEB_POD.name)
        for known in (None, "Kubernetes"):
            caller.taken(await caller.authority(cluster_id=known).issue(caller.request()))
        error = await caller.refused(caller.request(), cluster_id="elsewhere")
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert "cluster_id" in str(error)


async def test_a_node_agent_gets_the_certificates_of_its_nodes_pods(tmp_path: Path, cluster: Kubernetes) -> None:
    async with serving(tmp_path, cluster, plugged(tmp_path), CA_TRUSTED_NODE_ACCOUNTS="istio-system/ztunnel") as caller:
        caller.show(ZTUNNEL.name)
        current = caller.taken(
            await caller.authority(impersonate=True, cluster_id="Kubernetes").issue(caller.request())
        )
        caller.taken(
            await caller.authority(impersonate=True, cluster_id="Kubernetes").issue(caller.request(current=current))
        )
        absent = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/on-another-node"
        for cluster_id, uri in (("Kubernetes", absent), (None, WEB)):
            error = await caller.refused(caller.request(uri), impersonate=True, cluster_id=cluster_id)
            assert error.kind is ErrorKind.UNAUTHENTICATED
            assert "CA_TRUSTED_NODE_ACCOUNTS" in str(error)
