"""The CA's configuration: every mistake is told at once, with its line and the way to mend it."""

import re
import textwrap
from pathlib import Path

import pytest

from sds_agent.ca.settings import load
from sds_agent.config.problems import ConfigError

WHOLE = """
trust_domain: cluster.local
listen: "[::1]:15012"
server_names: [istiod.istio-system.svc, localhost, 10.0.0.1]
signer: {cacerts: cacerts}
callers:
  jwt:
    - issuer: "https://kubernetes.default.svc"
      audience: istio-ca
      jwks: "https://kubernetes.default.svc/openid/v1/jwks"
      ca_file: ca.crt
      token_file: token
    - {issuer: mine, audience: ca, jwks: keys.json, claim: spiffe_id}
  mtls: false
  join_tokens: tokens
  node_agents: [{identity: spiffe://cluster.local/node, may_act_for: [spiffe://cluster.local/ns/*]}]
limits: {at_once: 10, per_caller: 5, connections: 100, connection_age: 10m}
audit: audit.log
"""
LEAST = "trust_domain: cluster.local\nsigner: {self_signed: r}\ncallers: {join_tokens: t}\n"


def written(directory: Path, text: str) -> Path:
    path = directory / "ca.yaml"
    path.write_text(text)
    return path


def test_everything_can_be_said(tmp_path: Path) -> None:
    read = load(written(tmp_path, WHOLE))
    assert (read.listen.host, read.listen.port, str(read.listen)) == ("::1", 15012, "[::1]:15012")
    assert read.signer.cacerts == tmp_path / "cacerts"
    assert read.callers.jwt[0].jwks.startswith("https://")
    assert read.callers.jwt[1].jwks == str(tmp_path / "keys.json")
    assert read.node_agents["spiffe://cluster.local/node"].covers("spiffe://cluster.local/ns/a/sa/b")


def test_the_least_is_little_and_stays_on_this_machine(tmp_path: Path) -> None:
    read = load(written(tmp_path, LEAST))
    assert str(read.listen) == "127.0.0.1:15012"
    assert read.callers.mtls


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LEAST.replace("self_signed: r", ""), "give one of cacerts and self_signed"),
        (LEAST.replace("self_signed: r", "self_signed: r, cacerts: c"), "names two directories"),
        (LEAST.replace("join_tokens: t", "mtls: true"), "nobody get a first certificate"),
        (LEAST.replace("join_tokens", "join_token"), "did you mean join_tokens?"),
        (LEAST + "listen: 15012\n", "an address and a port"),
        (LEAST + "listen: '::1:15012'\n", "in brackets"),
        (LEAST + "listen: ':15012'\n", "every address"),
        (LEAST + "server_names: ['a b']\n", "DNS name"),
        (
            LEAST.replace("join_tokens: t", "jwt: [{issuer: i, audience: a, jwks: 'http://x/y'}]"),
            "begins with https://",
        ),
        (LEAST.replace("join_tokens: t", "jwt: [{issuer: i, audience: a, jwks: f, ca_file: c}]"), "is a file"),
        (
            LEAST.replace("t}", "t, node_agents: [{identity: spiffe://x/y, may_act_for: [spiffe://x/*]}]}"),
            "not in the trust domain",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(written(tmp_path, text))
    assert words in str(error.value)
    assert all(problem.origin.line > 0 for problem in error.value.problems)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(written(tmp_path, "trust_domain: X\nlisten: y\nsigner: 3\ncallers: []\nmore: 1\n"))
    assert len(error.value.problems) == 5


def test_the_page_shows_a_configuration_that_is_good(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "ca-server.md").read_text()
    (shown,) = re.findall(r"^((?:    .*\n)+)", page[: page.index("## Keys")], re.MULTILINE)
    read = load(written(tmp_path, textwrap.dedent(shown)))
    assert read.callers.join_tokens == Path("/var/lib/sds-agent/tokens")
