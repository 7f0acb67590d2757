"""What a configuration may say of a step-ca, and the words for what it may not."""

from pathlib import Path

import pytest
from fakes.configurations import MINIMAL, problems, settings

from sds_agent.authority import registry
from sds_agent.authority.step_ca.settings import StepCaSettings

FINGERPRINT = "7bc2f0e8c1a94d3b5f60d2a8e9417c3bb06f5ad1824e9c7035fe61b8da0942c7"
WITH_COLONS = ":".join(FINGERPRINT[n : n + 2] for n in range(0, 64, 2)).upper()
GOOD = {
    "url": "https://ca.example:9000",
    "provisioner": "sds",
    "fingerprint": f'"{FINGERPRINT}"',
    "jwk_file": "sds.jwe",
}


def text(**changed: str | None) -> str:
    keys = ", ".join(f"{key}: {value}" for key, value in {**GOOD, **changed}.items() if value is not None)
    return f"{MINIMAL}authorities: {{step: {{type: step-ca, {keys}}}}}\n"


def read(folder: Path, **changed: str | None) -> StepCaSettings:
    chosen = settings(folder, text(**changed)).authorities["step"]
    assert isinstance(chosen, StepCaSettings)
    return chosen


def said(folder: Path, **changed: str | None) -> list[str]:
    return [str(each).partition("authorities.step.")[2] for each in problems(folder, text(**changed))]


@pytest.mark.parametrize("written", [FINGERPRINT, FINGERPRINT.upper(), WITH_COLONS])
def test_a_fingerprint_is_taken_as_step_and_as_openssl_print_it(tmp_path: Path, written: str) -> None:
    assert read(tmp_path, fingerprint=f'"{written}"').fingerprint == FINGERPRINT


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"fingerprint": '"ab"'}, 'fingerprint is "ab"; it must be the SHA-256 of a root in 64 hexadecimal digits'),
        ({"fingerprint": "1" * 64}, "write it in quotes"),
        ({"fingerprint": None}, "fingerprint is missing; without it nothing vouches for step-ca's server"),
        ({"ca_file": "roots.pem"}, "fingerprint is given; the file that ca_file names has the roots already"),
        ({"url": "http://127.0.0.1:9000"}, "url begins with http; step-ca issues over TLS alone"),
        ({"jwk_file": None}, "jwk_file is missing; name the provisioner's private key"),
        ({"certificate_file": "a", "key_file": "b"}, "jwk_file is given; it is for a JWK provisioner"),
        ({"jwk_file": None, "certificate_file": "a"}, "key_file is missing; name the key"),
        ({"jwk_file": None, "key_file": "a"}, "certificate_file is missing; name the certificate"),
        (
            {"jwk_file": None, "certificate_file": "a", "key_file": "b", "password_file": "c"},
            "password_file is given; it is the password of jwk_file",
        ),
        ({"provisioner": '"a\\nb"'}, "provisioner is"),
        ({"refresh_every": "10ms"}, "refresh_every is"),
    ],
)
def test_a_wrong_key_is_named_with_the_way_out(tmp_path: Path, changed: dict[str, str | None], words: str) -> None:
    (only,) = said(tmp_path, **changed)
    assert words in only


def test_the_sentence_says_who_vouches_and_what_proves(tmp_path: Path) -> None:
    by_key = registry.kind("step-ca").sentence(read(tmp_path), "step")
    assert "the root with the pinned fingerprint" in by_key
    assert f"with tokens by the key in {tmp_path / 'sds.jwe'} and renews over mTLS." in by_key
    certificate = {"jwk_file": None, "certificate_file": "a.pem", "key_file": "a.key", "rekey": "false"}
    by_certificate = registry.kind("step-ca").sentence(read(tmp_path, **certificate), "step")
    assert f"the certificate in {tmp_path / 'a.pem'} for every certificate." in by_certificate
