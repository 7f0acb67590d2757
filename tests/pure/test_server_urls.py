"""Where a CA's server is, as an operator writes it."""

from pathlib import Path

import pytest
from fakes.configurations import MINIMAL, problems

from sds_agent.authority.http_settings import server_url
from sds_agent.configfile.types import UnacceptableError

HERE = Path("/")


@pytest.mark.parametrize(
    "written",
    [
        "https://ca.example",
        "https://ca.example:9000",
        "https://10.0.0.1:8888/ca/path",
        "https://[2001:db8::1]:8443",
        "https://[::ffff:192.0.2.1]",
        "http://127.0.0.1:8200",
        "http://localhost",
        "http://[::1]:8200",
    ],
)
def test_a_url_is_taken_as_it_is(written: str) -> None:
    assert server_url(written, HERE) == written


def test_a_slash_at_the_end_does_not_count() -> None:
    assert server_url("https://ca.example/mesh/", HERE) == "https://ca.example/mesh"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("ca.example:9000", "begin it with https://"),
        ("ftp://ca.example", "begin it with https://"),
        ("https://ca.example?x=1", "leave out user, query and fragment"),
        ("https://ca.example#x", "leave out user, query and fragment"),
        ("https://ca.example\n", "is no such URL"),
        ("https://ca.example:0", "ports go from 1 to 65535"),
        ("https://ca.example:65536", "ports go from 1 to 65535"),
        ("https://[1.2]:8888", '"1.2" in its brackets is no IPv6 address'),
        ("https://[::::]:8888", '"::::" in its brackets is no IPv6 address'),
        ("https://[127.0.0.1]", "is no IPv6 address"),
        ("http://ca.example", "it has to be on this machine"),
        ("http://127.0.0.1.evil.example", "it has to be on this machine"),
        ("http://[2001:db8::1]", "it has to be on this machine"),
    ],
)
def test_what_is_no_such_url_is_refused_with_the_reason(written: str, said: str) -> None:
    with pytest.raises(UnacceptableError) as caught:
        server_url(written, HERE)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "authorities: {corp: {type: est, url: 'https://agent:hunter2@ca.example', username: agent}}",
        "authorities: {corp: {type: est, url: 'https://agent:hunter2/@#@ca.example'}}",
        "authorities: {corp: {type: vault, url: ['https://a.example', 'https://agent:hunter2@b.example'], role: web}}",
        "authorities: {mesh: {type: istio, address: 'https://agent:hunter2@ca.example:15012'}}",
        "telemetry: {otlp_endpoint: 'https://agent:hunter2@collector.example'}",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    said = "\n".join(map(str, problems(tmp_path, f"{MINIMAL}{text}\n")))
    assert "//***@" in said
    assert "hunter2" not in said
