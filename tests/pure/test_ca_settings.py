"""The CA's configuration: every mistake is reported at once, with its line and the way to fix it."""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml
from fakes import editors

from sds_agent.ca.schema import FILE, json_schema
from sds_agent.ca.settings import load
from sds_agent.errors import ProblemsError

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
    - {issuer: mine, audience: ca, jwks: keys.json, claim: spiffe_id, allow: [spiffe://cluster.local/ci/*]}
  mtls: false
  join_tokens: tokens
  node_agents: [{identity: spiffe://cluster.local/node, may_act_for: [spiffe://cluster.local/ns/*]}]
limits: {at_once: 10, per_caller: 5, connections: 100, connection_age: 10m}
audit: audit.log
"""
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ca-server.md").read_text()
KEYS = (ROOT / "docs" / "configuration-keys.md").read_text()
EXAMPLE = textwrap.dedent(
    re.findall(r"^((?:    .*\n)+)", PAGE[PAGE.index("## The file") : PAGE.index("## Keys")], re.MULTILINE)[0]
)
LEAST = "trust_domain: cluster.local\nsigner: {self_signed: r}\ncallers: {join_tokens: t}\n"


@pytest.fixture(scope="module")
def editor() -> Any:
    return editors.editor(json_schema())


def written(directory: Path, text: str) -> Path:
    path = directory / "ca.yaml"
    path.write_text(text)
    return path


def test_every_key_is_read(tmp_path: Path) -> None:
    read = load(written(tmp_path, WHOLE))
    assert (read.listen.host, read.listen.port, str(read.listen)) == ("::1", 15012, "[::1]:15012")
    assert read.signer.cacerts == tmp_path / "cacerts"
    assert read.callers.jwt[0].jwks.startswith("https://")
    assert read.callers.jwt[1].allow == ("spiffe://cluster.local/ci/*",)
    assert read.callers.jwt[1].jwks == str(tmp_path / "keys.json")
    assert read.node_agents["spiffe://cluster.local/node"].covers("spiffe://cluster.local/ns/a/sa/b")


def test_the_shortest_file_listens_on_loopback_and_asks_for_certificates(tmp_path: Path) -> None:
    read = load(written(tmp_path, LEAST))
    assert str(read.listen) == "127.0.0.1:15012"
    assert read.callers.mtls


def node_agent(identity: str, covered: str) -> str:
    return LEAST.replace("t}", f"t, node_agents: [{{identity: '{identity}', may_act_for: ['{covered}']}}]}}")


def issuer_at(url: str) -> str:
    return LEAST.replace("join_tokens: t", f"jwt: [{{issuer: i, audience: a, jwks: '{url}'}}]")


@pytest.mark.parametrize(
    "url",
    [
        "https://issuer.example/keys?of=all#these",
        "https://ISSUER_1:8443",
        "https://[::1]:8443/keys",
        "https://10.0.0.1:443",
        "https://issuer.example./keys",
        "https://b\u00fccher.example/keys",
    ],
)
def test_a_url_that_can_be_fetched_is_taken_as_it_is(tmp_path: Path, url: str, editor: Any) -> None:
    text = issuer_at(url)
    assert load(written(tmp_path, text)).callers.jwt[0].jwks == url
    editor.validate(yaml.safe_load(text))


@pytest.mark.parametrize("rest", ["issuer.example/keys", "issuer.example:99999999/keys", "[bad", "a b", "?x", ""])
def test_a_password_in_a_url_is_refused_and_not_shown(tmp_path: Path, rest: str) -> None:
    """It would be sent in the place of the token in token_file, and be logged whenever the issuer is down."""
    with pytest.raises(ProblemsError) as error:
        load(written(tmp_path, issuer_at(f"https://reader:secret@{rest}")))
    assert "callers.jwt[0].jwks has a user's name or a password in it" in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LEAST.replace("self_signed: r", ""), "give one of cacerts and self_signed"),
        (LEAST.replace("self_signed: r", "self_signed: r, cacerts: c"), "names two directories"),
        (
            LEAST.replace("self_signed: r", "self_signed: r, passphrase_file: p"),
            "the key of self_signed is not encrypted",
        ),
        (LEAST.replace("join_tokens: t", "mtls: true"), "no caller a first certificate"),
        (LEAST.replace("join_tokens", "join_token"), "did you mean join_tokens?"),
        (LEAST + "listen: 15012\n", "an address and a port"),
        (LEAST + "listen: '::1:15012'\n", "in brackets"),
        (LEAST + "listen: ':15012'\n", "every address"),
        (LEAST + "server_names: ['a b']\n", "DNS name"),
        (
            LEAST.replace("join_tokens: t", "jwt: [{issuer: i, audience: a, jwks: 'http://x/y'}]"),
            "a URL such as https://",
        ),
        (issuer_at("https://"), "it must name a host"),
        (issuer_at("https:///keys"), "it must name a host"),
        (issuer_at("https://[bad"), "it must name a host"),
        (issuer_at("https://issuer example/keys"), "have no spaces"),
        (issuer_at("https://issuer.example/the keys"), "have no spaces"),
        (issuer_at("https://issuer.example:99999999/keys"), "between 1 and 65535"),
        (issuer_at("https://issuer.example:65536/keys"), "between 1 and 65535"),
        (issuer_at("https://[::1::2]/keys"), "neither a host's name nor an IP address"),
        (issuer_at("https://10.0.0.256/keys"), "neither a host's name nor an IP address"),
        (issuer_at("https://issuer..example/keys"), "neither a host's name nor an IP address"),
        (LEAST.replace("join_tokens: t", "jwt: [{issuer: i, audience: a, jwks: f, ca_file: c}]"), "is a file"),
        (LEAST + "listen: '127.0.0.1:65536'\n", "an address and a port"),
        (node_agent("spiffe://cluster.local.evil/node", "spiffe://cluster.local/*"), "not in the trust domain"),
        (node_agent("spiffe://cluster.local/node", "spiffe://cluster.local.evil/*"), "not in the trust domain"),
        (node_agent("spiffe://cluster.local/node", "spiffe://cluster.local"), "has no path"),
        (
            LEAST.replace("join_tokens: t", "jwt: [{issuer: i, audience: a, jwks: f, allow: ['spiffe://other/*']}]"),
            "not in the trust domain",
        ),
        (
            LEAST.replace(
                "join_tokens: t",
                "jwt: [{issuer: i, audience: a, jwks: f, allow: ['spiffe://cluster.local.evil/*']}]",
            ),
            "not in the trust domain",
        ),
    ],
)
def test_a_mistake_is_reported_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ProblemsError) as error:
        load(written(tmp_path, text))
    assert words in str(error.value)
    assert all(problem.line > 0 for problem in error.value.problems)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ProblemsError) as error:
        load(written(tmp_path, "trust_domain: X\nlisten: y\nsigner: 3\ncallers: []\nmore: 1\n"))
    assert len(error.value.problems) == 5


def test_keys_are_compared_although_others_cannot_be_read(tmp_path: Path) -> None:
    text = (
        "trust_domain: cluster.local\n"
        "signer: {root_lifetime: soon}\n"
        "callers:\n"
        "  jwt: [5, {issuer: i, audience: 7, jwks: keys.json, ca_file: ca.crt, allow: [x, 'spiffe://other/*']}]\n"
        "  node_agents: [{identity: spiffe://other/node, may_act_for: 3}, 4]\n"
    )
    with pytest.raises(ProblemsError) as error:
        load(written(tmp_path, text))
    assert {each.key for each in error.value.problems} == {
        "signer",
        "signer.root_lifetime",
        "callers.jwt[0]",
        "callers.jwt[1].audience",
        "callers.jwt[1].ca_file",
        "callers.jwt[1].allow[0]",
        "callers.jwt[1].allow[1]",
        "callers.node_agents[0].identity",
        "callers.node_agents[0].may_act_for",
        "callers.node_agents[1]",
    }


def test_the_page_shows_a_configuration_that_is_good(tmp_path: Path) -> None:
    read = load(written(tmp_path, EXAMPLE))
    assert read.callers.join_tokens == Path("/var/lib/sds-agent/tokens")


# The schema


def test_the_schema_that_is_checked_in_is_what_the_settings_give() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert json.loads(FILE.read_text()) == json_schema()


@pytest.mark.parametrize(
    "text",
    [WHOLE, LEAST, EXAMPLE, (ROOT / "envoy" / "compose" / "ca.yaml").read_text()],
    ids=["whole", "least", "the page's", "the compose setup's"],
)
def test_the_schema_accepts_every_file_that_the_ca_accepts(text: str, tmp_path: Path, editor: Any) -> None:
    load(written(tmp_path, text))
    editor.validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "change",
    [
        "trust_domain: X",
        "unknown: 1",
        "listen: 15012",
        "listen: '::1:15012'",
        "listen: ':15012'",
        "server_names: []",
        "server_names: ['a b']",
        "server_names: [Upper.example]",
        "signer: {cacerts: ''}",
        "signer: {self_signed: r, key: ec-p999}",
        "signer: {self_signed: r, root_lifetime: 10}",
        "callers: {join_tokens: t, mtls: 1}",
        "callers: {join_tokens: t, jwt: []}",
        "callers: {jwt: [{issuer: i, audience: a}]}",
        "callers: {jwt: [{issuer: '', audience: a, jwks: f}]}",
        "callers: {jwt: [{issuer: i, audience: a, jwks: 'http://x/y'}]}",
        "callers: {jwt: [{issuer: i, audience: a, jwks: 'https://'}]}",
        "callers: {jwt: [{issuer: i, audience: a, jwks: 'https://[bad'}]}",
        "callers: {jwt: [{issuer: i, audience: a, jwks: 'https://x:99999999/y'}]}",
        "callers: {jwt: [{issuer: i, audience: a, jwks: 'https://u:p@x/y'}]}",
        "callers: {join_tokens: t, node_agents: [{identity: spiffe://cluster.local/a}]}",
        "callers: {join_tokens: t, node_agents: [{identity: a, may_act_for: [spiffe://cluster.local/*]}]}",
        "callers: {join_tokens: t, node_agents: [{identity: spiffe://cluster.local/a, may_act_for: ['*']}]}",
        "limits: {at_once: 0}",
        "limits: {connection_age: forever}",
        "log: {level: loud}",
    ],
)
def test_the_schema_refuses_what_the_ca_refuses(change: str, tmp_path: Path, editor: Any) -> None:
    text = yaml.safe_dump(yaml.safe_load(LEAST) | yaml.safe_load(change))
    with pytest.raises(ProblemsError):
        load(written(tmp_path, text))
    with pytest.raises(jsonschema.ValidationError):
        editor.validate(yaml.safe_load(text))


def test_the_page_lists_every_key_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", KEYS[KEYS.index("## `sds-agent ca serve`") :], re.MULTILINE))
    for path, default in defaults(json_schema(), json_schema()["$defs"]).items():
        if default is not None:
            words = default if isinstance(default, list) else [str(default).lower()]
            assert rows[path] == ", ".join(f"`{word}`" for word in words), path
        else:
            assert rows[path] in {"", "required"} or path == "admin.socket", path  # which the agent alone fills in


def defaults(schema: dict[str, Any], definitions: dict[str, Any], path: str = "") -> dict[str, object]:
    """Every key of the schema that holds no others, with its default; None without one."""
    found: dict[str, object] = {}
    for name, given in schema.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        inner, item = (
            definitions.get(each.get("$ref", "").removeprefix("#/$defs/"), {}) | each
            for each in (given, given.get("items", {}))
        )
        below = defaults(inner, definitions, here) | defaults(item, definitions, f"{here}[]")
        found |= below or {here: inner.get("default")}
    return found
