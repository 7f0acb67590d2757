"""The agent with CFSSL 1.6.5 as its CA."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ca_interop.driver import URI, Server, agent, free_port, program, server
from cryptography import x509
from fakes.hierarchy import Ca, common_name, make_ca, make_leaf, new_key

from sds_agent.pki.certificates import subject_alternative_uris, write_pem
from sds_agent.pki.keys import to_pkcs8_pem

DAY = timedelta(days=1)
KEY = "0123456789abcdef0123456789abcdef"
USAGES = ["digital signature", "server auth", "client auth"]
MESH = {"usages": USAGES, "expiry": "75s", "backdate": "30s", "auth_key": "mesh"}
"""CFSSL rounds NotBefore to a whole minute: such a certificate is valid for 15 to 75 s from its issue."""


def ca(name: str, issuer: Ca | None = None) -> Ca:
    now = datetime.now(UTC)
    return make_ca(name, issuer, not_before=now - DAY, not_after=now + DAY)


class Cfssl:
    """What a CFSSL is started with: its CA, its TLS, its profiles."""

    def __init__(self, place: Path, version: str = "cfssl") -> None:
        self.place = place
        self.port = free_port()
        self.tls = ca("tls root")
        self.version = version
        now = datetime.now(UTC)
        key, names = new_key(), [x509.DNSName("localhost")]
        leaf = make_leaf(self.tls, None, key=key, names=names, not_before=now - DAY, not_after=now + DAY)
        self.write("tls.pem", write_pem([leaf]))
        self.write("tls-key.pem", to_pkcs8_pem(key))
        self.write("tls-root.pem", write_pem([self.tls.certificate]))
        self.write("hmac", KEY.encode())
        self.options: list[str] = []
        self.profiles(mesh=MESH)

    def write(self, name: str, content: bytes) -> Path:
        (self.place / name).write_bytes(content)
        return self.place / name

    def profiles(self, default: Mapping[str, object] = MESH, **profiles: Mapping[str, object]) -> None:
        """Its signing policy."""
        policy = {"signing": {"default": default, "profiles": profiles}}
        keys = {"auth_keys": {"mesh": {"type": "standard", "key": KEY}}}
        self.write("config.json", json.dumps(policy | keys).encode())

    def sign_with(self, signer: Ca) -> None:
        """The CA's certificate and key from the next start on."""
        self.write("ca.pem", write_pem([signer.certificate]))
        self.write("ca-key.pem", to_pkcs8_pem(signer.key))  # type: ignore[arg-type]  # of a kind that is ours

    def server(self) -> Server:
        options = [
            "-address=127.0.0.1",
            f"-port={self.port}",
            "-ca=ca.pem",
            "-ca-key=ca-key.pem",
            "-config=config.json",
        ]
        tls = ["-tls-cert=tls.pem", "-tls-key=tls-key.pem"]
        command = [program(self.version), "serve", *options, *tls, *self.options]
        return Server(self.place / "cfssl.log", command, port=self.port, directory=self.place)

    def settings(self, **more: object) -> dict[str, object]:
        """The authority that leads to it."""
        return {
            "type": "cfssl",
            "url": f"https://localhost:{self.port}",
            "ca_file": self.place / "tls-root.pem",
            "auth_key_file": self.place / "hmac",
            "profile": "mesh",
            "refresh_every": "1s",
            **more,
        }


async def test_first_certificate_and_three_renewals_by_authsign(place: Path) -> None:
    cfssl, root = Cfssl(place), ca("root")
    cfssl.sign_with(root)
    async with server(cfssl.server()), agent(place, cfssl.settings(), ttl="1m", fraction=0.2) as running:
        first = await running.first()
        newest = await running.renewed(3)
        assert subject_alternative_uris(first) == subject_alternative_uris(newest) == (URI,)
        assert first.public_key() != newest.public_key()
        assert running.bundle == (root.certificate,)


async def test_without_an_auth_key_by_sign(place: Path) -> None:
    cfssl, root = Cfssl(place), ca("root")
    cfssl.sign_with(root)
    cfssl.profiles({**MESH, "auth_key": ""}, mesh={**MESH, "auth_key": ""})
    chosen = cfssl.settings()
    del chosen["auth_key_file"]
    async with server(cfssl.server()), agent(place, chosen, ttl="1m") as running:
        assert subject_alternative_uris(await running.first()) == (URI,)


async def test_an_intermediate_signs_and_the_root_comes_with_the_bundle_over_mtls(place: Path) -> None:
    cfssl, root = Cfssl(place), ca("root")
    upper = ca("upper", root)
    signer = ca("signer", upper)
    cfssl.sign_with(signer)
    cfssl.write("ca-bundle.pem", write_pem([root.certificate]))
    cfssl.write("int-bundle.pem", write_pem([upper.certificate, signer.certificate]))
    cfssl.options = ["-ca-bundle=ca-bundle.pem", "-int-bundle=int-bundle.pem", "-mutual-tls-ca=tls-root.pem"]
    key, now = new_key(), datetime.now(UTC)
    client = make_leaf(
        cfssl.tls, None, key=key, subject=common_name("agent"), not_before=now - DAY, not_after=now + DAY
    )
    pair = {
        "certificate_file": cfssl.write("client.pem", write_pem([client])),
        "key_file": cfssl.write("client-key.pem", to_pkcs8_pem(key)),
    }
    cfssl.options.append("-mutual-tls-cn=^agent$")
    async with server(cfssl.server()), agent(place, cfssl.settings(bundle=True, **pair), ttl="1m") as running:
        await running.first()
        assert running.chain()[1:] == (signer.certificate, upper.certificate)
        assert running.bundle == (root.certificate,)


async def test_a_restart_of_cfssl_and_of_the_agent_costs_no_certificate(place: Path) -> None:
    cfssl, root = Cfssl(place), ca("root")
    cfssl.sign_with(root)
    async with server(cfssl.server()) as running_ca:
        async with agent(place, cfssl.settings(), ttl="1m", fraction=0.2) as running:
            await running.first()
            await running_ca.restart()
            newest = await running.more()
        await running_ca.stop()
        async with agent(place, cfssl.settings(), ttl="1m", fraction=0.2) as again:
            await again.event("restored")
            assert again.chain()[0] == newest
            await again.event("retrying", kind="transient")
            await running_ca.start()
            assert await again.more() != newest


async def test_a_new_ca_key_is_trusted_beside_the_old_one_while_that_is_needed(place: Path) -> None:
    cfssl, old, new = Cfssl(place), ca("old root"), ca("new root")
    cfssl.sign_with(old)
    async with server(cfssl.server()) as running_ca, agent(place, cfssl.settings(), ttl="1m", fraction=0.2) as running:
        await running.first()
        cfssl.sign_with(new)
        await running_ca.restart()
        await running.bundle_with(old.certificate, new.certificate)
        renewed = await running.more()
        renewed.verify_directly_issued_by(new.certificate)
        await running.bundle_with(new.certificate, within=120)


async def test_an_outage_costs_no_valid_certificate(place: Path) -> None:
    cfssl, root = Cfssl(place), ca("root")
    cfssl.sign_with(root)
    async with server(cfssl.server()) as running_ca, agent(place, cfssl.settings(), ttl="1m", fraction=0.2) as running:
        first = await running.first()
        await running_ca.stop()
        await running.event("retrying", count=2, kind="transient", serving="the current certificate")
        assert running.chain()[0] == first
        assert running.bundle == (root.certificate,)
        await running_ca.start()
        assert await running.more() != first


async def test_what_a_real_cfssl_refuses_is_answered_with_what_to_do(place: Path) -> None:
    cfssl = Cfssl(place)
    cfssl.sign_with(ca("root"))
    cfssl.profiles(
        MESH,
        open={**MESH, "auth_key": ""},
        listed={**MESH, "name_whitelist": "^ca\\.example$"},
        server={**MESH, "usages": ["signing", "server auth"]},
        unnamed={**MESH, "usages": ["signing", "cert sign"], "ca_constraint": {"is_ca": True}},
    )
    plain = cfssl.settings()
    del plain["auth_key_file"]
    wrong = cfssl.write("wrong", b"00ff")
    expected = [
        (cfssl.settings(auth_key_file=wrong), "unauthenticated", "(invalid token); put the key"),
        (cfssl.settings(profile="open"), "denied", "(no authentication provider); the profile has no auth_key"),
        ({**plain, "profile": "mesh"}, "unauthenticated", "(authentication required); the profile has an auth_key"),
        (cfssl.settings(profile="listed"), "denied", "let the profile's name_whitelist match"),
        (cfssl.settings(profile="server"), "mismatch", 'without client auth; add "client auth" to its'),
        (cfssl.settings(profile="unnamed"), "mismatch", "let the profile issue no CAs"),
        (cfssl.settings(url=f"https://localhost:{cfssl.port}/elsewhere"), "denied", "(404: 404 page not found)"),
    ]
    async with server(cfssl.server()):
        for authority, kind, words in expected:
            async with agent(place, authority, ttl="1m") as running:
                error = await running.event("retrying")
            assert (error["kind"], words in error["cause"]) == (kind, True), error["cause"]


async def test_a_name_that_cfssl_does_not_know_is_the_default_profile_and_named(place: Path) -> None:
    cfssl = Cfssl(place)
    cfssl.sign_with(ca("root"))
    async with server(cfssl.server()), agent(place, cfssl.settings(profile="mash"), ttl="1m") as running:
        await running.first()
        warning = await running.event("ca_warning")
    assert "info says of the profile 'mash' what it says of CFSSL's default one" in warning["warning"]
