"""The files that the settings of a CA name, where the disk does not give them."""

import errno
from pathlib import Path

import pytest
from fakes.hierarchy import make_ca
from fakes.odd_certificates import NOT_READ, together

from sds_agent.authority.operator_files import OperatorFiles
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.pki.certificates import read_bundle, write_pem


def silent() -> bytes:
    raise TimeoutError(errno.ETIMEDOUT, "no answer within 5 s")


async def test_a_disk_that_does_not_answer_is_named_as_the_cause() -> None:
    with pytest.raises(AuthorityError) as caught:
        await OperatorFiles().read("the token (/mnt/token)", silent)
    assert caught.value.kind is ErrorKind.UNAUTHENTICATED
    assert (
        str(caught.value) == "the token (/mnt/token) cannot be read: no answer within 5 s; check that the disk is there"
    )


async def test_keys_that_name_no_file_read_none(tmp_path: Path) -> None:
    files = OperatorFiles()
    assert await files.server_roots(None) is None
    assert await files.client_certificate(None, tmp_path / "key.pem") is None


async def test_a_file_that_is_gone_is_named_with_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(
        AuthorityError, match=r"^the trust domain's roots cannot be read from .*roots\.pem: No such file"
    ):
        await OperatorFiles().trust_roots(tmp_path / "roots.pem")


async def test_a_root_that_cannot_be_used_is_told_with_the_others_and_is_no_servers(tmp_path: Path) -> None:
    """Or nobody would hear that peers below it are refused (`anchors_left_out`)."""
    file, odd = tmp_path / "roots.pem", together(NOT_READ["_ in PrintableString"])
    file.write_bytes(odd)
    told = read_bundle(await OperatorFiles().trust_roots(file))
    assert (told.certificates, len(told.left_out)) == (read_bundle(odd).certificates, 1)
    assert read_bundle(await OperatorFiles().server_roots(file) or b"").left_out == ()


async def test_a_root_that_is_cut_off_costs_no_other(tmp_path: Path) -> None:
    file, (first, second) = tmp_path / "roots.pem", (write_pem([make_ca(name).certificate]) for name in ("a", "b"))
    file.write_bytes(first.replace(b"-----END CERTIFICATE-----\n", b"") + second)
    told = read_bundle(await OperatorFiles().trust_roots(file))
    assert (write_pem(told.certificates), len(told.left_out)) == (second, 1)
