"""The agent with CFSSL 1.2.0, which Debian has: it drops the SAN and answers success."""

from pathlib import Path

from ca_interop.driver import agent, server
from ca_interop.test_cfssl import MESH, Cfssl, ca


async def test_the_dropped_san_is_named_and_no_certificate_is_served(place: Path) -> None:
    cfssl = Cfssl(place, "cfssl-1.2.0")
    cfssl.sign_with(ca("root"))
    async with server(cfssl.server()), agent(place, cfssl.settings(), ttl="1m") as running:
        refused = await running.event("retrying")
        assert refused["kind"] == "mismatch"
        assert "CFSSL answered success and dropped the SAN, the URI that is the workload's identity" in refused["cause"]
        assert "CFSSL before 1.3, such as Debian's 1.2.0, knows no URIs: install a newer one" in refused["cause"]
        assert refused["serving"] == "nothing"


async def test_sign_without_a_key_ends_in_the_same_words(place: Path) -> None:
    cfssl = Cfssl(place, "cfssl-1.2.0")
    cfssl.sign_with(ca("root"))
    cfssl.profiles({**MESH, "auth_key": ""})
    chosen = cfssl.settings()
    del chosen["auth_key_file"]
    async with server(cfssl.server()), agent(place, chosen, ttl="1m") as running:
        refused = await running.event("retrying")
        assert "dropped the SAN" in refused["cause"]
