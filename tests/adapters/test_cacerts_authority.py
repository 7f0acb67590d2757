"""The authority `cacerts`: a new CA is noticed however it comes, its roots come first, and bad sets change nothing."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from fakes import der
from fakes.ca_files import files_of, write
from fakes.clocks import HandClock
from fakes.events import recorded
from fakes.hierarchy import DAY, HOUR, NOW, URI, Ca, make_ca, make_crl, new_key, uris
from fakes.odd_certificates import NOT_LOADED, NOT_READ

from sds_agent.authority.cacerts import REFRESH
from sds_agent.authority.in_process import InProcessAuthority
from sds_agent.authority.protocol import (
    AdvertisesAnchors,
    AuthorityError,
    CertifiesKeys,
    ErrorKind,
    IssueRequest,
)
from sds_agent.errors import ConfigurationError
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.pki.certificates import has_key, read_pem, subject_alternative_uris, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate
from sds_agent.signing.directory import check
from sds_agent.signing.plugged import SETTLE, PluggedCa

Replace = Callable[[Path, Mapping[str, bytes]], None]


def in_place(directory: Path, files: Mapping[str, bytes]) -> None:
    write(directory, files)


def by_renames(directory: Path, files: Mapping[str, bytes]) -> None:
    directory.mkdir(exist_ok=True)
    for name, data in files.items():
        (directory / f"{name}.new").write_bytes(data)
        (directory / f"{name}.new").rename(directory / name)


def by_symlink(directory: Path, files: Mapping[str, bytes]) -> None:
    """As Kubernetes does it: files are links into ..data, itself a link to a directory that is swapped by a rename."""
    directory.mkdir(exist_ok=True)
    version = directory / f"..{len(list(directory.iterdir()))}"
    write(version, files)
    (directory / "..new").symlink_to(version.name)
    (directory / "..new").rename(directory / "..data")
    for name in files:
        if not (directory / name).is_symlink():
            (directory / name).unlink(missing_ok=True)
            (directory / name).symlink_to(f"..data/{name}")


def hierarchy(number: int) -> tuple[Ca, Ca]:
    root = make_ca(f"root {number}")
    return make_ca(f"signer {number}", root), root


def request(csr: bytes | None = None) -> IssueRequest:
    csr = csr or make_csr(generate(KeyType.EC_P256), URI)
    return IssueRequest(SpiffeId.parse(URI), csr, HOUR, "1")


async def opened(directory: Path, clock: HandClock, passphrase_file: Path | None = None) -> InProcessAuthority:
    ca = await PluggedCa.open(directory, trust_domain="demo.example", passphrase_file=passphrase_file, clock=clock)
    return InProcessAuthority(ca, f"the CA in {directory}", clock, REFRESH)


async def signer_of(authority: InProcessAuthority) -> x509.Certificate:
    """The certificate that signs now; what it signs has to chain to a root of the same answer."""
    issuance = await authority.issue(request())
    leaf, signer = read_pem(issuance.chain_pem)
    leaf.verify_directly_issued_by(signer)
    assert issuance.anchors_pem is not None
    assert signer.issuer in {root.subject for root in read_pem(issuance.anchors_pem)}
    return signer


async def roots(authority: InProcessAuthority) -> set[x509.Certificate]:
    return set(read_pem(await authority.anchors()))


def with_roots(trusted: Iterable[x509.Certificate], signer: Ca, root: Ca) -> dict[str, bytes]:
    """The files of a signer below `root`, and these for its roots."""
    return {**files_of(signer, root), "root-cert.pem": write_pem(trusted)}


@pytest.mark.parametrize("replace", [in_place, by_renames, by_symlink])
async def test_a_new_ca_is_noticed_three_times_in_a_row_and_its_roots_come_first(
    replace: Replace, tmp_path: Path
) -> None:
    clock = HandClock()
    signer, root = hierarchy(0)
    replace(tmp_path / "ca", files_of(signer, root))
    authority = await opened(tmp_path / "ca", clock)
    assert isinstance(authority, AdvertisesAnchors)
    assert await roots(authority) == {root.certificate}
    for number in (1, 2, 3):
        new_signer, new_root = hierarchy(number)
        replace(tmp_path / "ca", files_of(new_signer, new_root))
        assert await roots(authority) == {root.certificate, new_root.certificate}
        assert await signer_of(authority) == signer.certificate
        issuance = await authority.issue(request())
        assert set(read_pem(issuance.anchors_pem or b"")) == {root.certificate, new_root.certificate}, "nor taken back"
        clock.elapse(SETTLE - SETTLE / 100)
        assert await signer_of(authority) == signer.certificate
        clock.elapse(SETTLE / 100)
        assert await signer_of(authority) == new_signer.certificate
        assert await roots(authority) == {new_root.certificate}
        signer, root = new_signer, new_root


async def test_a_new_signer_below_the_same_root_signs_at_once(tmp_path: Path) -> None:
    root = make_ca("root")
    write(tmp_path, files_of(make_ca("one", root), root))
    authority = await opened(tmp_path, HandClock())
    two = make_ca("two", root)
    write(tmp_path, files_of(two, root))
    assert await signer_of(authority) == two.certificate


async def test_a_new_signer_below_a_root_that_was_added_waits_for_it_to_be_known(tmp_path: Path) -> None:
    """The old root in the new bundle does not help: no Envoy would take the new signer's leaves yet."""
    signer, root = hierarchy(0)
    new_signer, new_root = hierarchy(1)
    clock = HandClock()
    authority = await opened(write(tmp_path, files_of(signer, root)), clock)
    both = write_pem([root.certificate, new_root.certificate])
    write(tmp_path, {**files_of(new_signer, new_root), "root-cert.pem": both})
    assert await signer_of(authority) == signer.certificate
    assert await roots(authority) == {root.certificate, new_root.certificate}
    clock.elapse(SETTLE)
    assert await signer_of(authority) == new_signer.certificate


async def test_a_half_written_set_is_refused_once_in_words_and_the_old_one_signs(tmp_path: Path) -> None:
    signer, root = hierarchy(0)
    write(tmp_path, files_of(signer, root))
    clock = HandClock()
    authority = await opened(tmp_path, clock)
    new_signer, new_root = hierarchy(1)
    with recorded() as events:
        for count, (name, data) in enumerate(files_of(new_signer, new_root).items()):
            for half in (data[: len(data) // 2], data):
                (tmp_path / name).write_bytes(half)
                for _ in range(3):
                    assert await signer_of(authority) == signer.certificate
            if count == 0:
                assert len(events.named("ca_refused")) == 2, "one for each content"
        refused = events.named("ca_refused")
    assert all(event["serving"].startswith("the CA that was read before") for event in refused)
    assert refused[1]["causes"][0].startswith("ca-cert.pem and ca-key.pem: ")
    secret = files_of(new_signer)["ca-key.pem"].decode().splitlines()[1:-1]
    assert not any(line in str(events.seen) for line in secret)
    await authority.anchors()
    clock.elapse(SETTLE)
    assert await signer_of(authority) == new_signer.certificate


@pytest.mark.parametrize("damage", [b"-----BEGIN X509 CRL-----\nMIIB\n", b"\x30\x82", b"forged"])
async def test_a_damaged_revocation_list_neither_stops_the_start_nor_holds_up_a_new_ca(
    tmp_path: Path, damage: bytes
) -> None:
    """The agent uses no list. One that stayed on the old CA because of it would issue nothing once that CA expires."""
    clock = HandClock(NOW)
    (old, root), (new, _) = hierarchy(1), hierarchy(2)
    new = make_ca("signer 2", root)
    forged = make_crl(root, 7, key=new_key()).public_bytes(Encoding.PEM)
    lists = {"ca-crl.pem": forged if damage == b"forged" else damage}
    with recorded() as events:
        authority = await opened(write(tmp_path, {**files_of(old, root), **lists}), clock)
        write(tmp_path, files_of(new, root))
        issuance = await authority.issue(request())
        await authority.issue(request())
    check(tmp_path, "demo.example", None, NOW)  # nor does `sds-agent check` say that it cannot start here
    assert read_pem(issuance.chain_pem)[1] == new.certificate
    first, _ = reported = events.named("ca_files_left_out")
    assert len(reported) == 2, "once for each content"
    assert first["level"] == "error"
    assert first["causes"][0].startswith("ca-crl.pem: ")
    assert not events.named("ca_refused")


async def test_the_agent_reports_an_unusable_root_and_advertises_the_others(tmp_path: Path) -> None:
    signer, root = hierarchy(1)
    files = files_of(signer, root)
    for odd in (NOT_LOADED["version 1 with extensions"], NOT_READ["_ in PrintableString"]):
        both = {**files, "root-cert.pem": der.pem(odd) + files["root-cert.pem"]}
        with recorded() as events:
            authority = await opened(write(tmp_path, both), HandClock(NOW))
        assert read_pem(await authority.anchors()) == (root.certificate,)
        assert "root-cert.pem: PEM block 1 is " in str(events.named("ca_files_left_out")[0]["causes"])


async def test_a_directory_that_goes_away_is_refused_once_and_taken_again(tmp_path: Path) -> None:
    signer, root = hierarchy(0)
    directory = write(tmp_path / "ca", files_of(signer, root))
    authority = await opened(directory, HandClock())
    with recorded() as events:
        directory.rename(tmp_path / "away")
        for _ in range(3):
            assert await signer_of(authority) == signer.certificate
        assert len(events.named("ca_refused")) == 1
        (tmp_path / "away").rename(directory)
        assert await roots(authority) == {root.certificate}


async def test_a_set_that_is_taken_back_before_it_signs_never_signs(tmp_path: Path) -> None:
    signer, root = hierarchy(0)
    clock = HandClock()
    authority = await opened(write(tmp_path, files_of(signer, root)), clock)
    write(tmp_path, files_of(*hierarchy(1)))
    assert await signer_of(authority) == signer.certificate
    write(tmp_path, files_of(signer, root))
    clock.elapse(SETTLE)
    assert await signer_of(authority) == signer.certificate
    assert await roots(authority) == {root.certificate}


async def test_a_clock_that_is_set_neither_hurries_the_new_signer_nor_puts_it_off(tmp_path: Path) -> None:
    """Set ahead, it would let the new CA sign before Envoys have its root."""
    clock = HandClock()
    authority = await opened(write(tmp_path, files_of(*hierarchy(0))), clock)
    signer, root = hierarchy(1)
    write(tmp_path, files_of(signer, root))
    await authority.anchors()
    for step in (HOUR / 2, -HOUR):
        clock.set_wall(step)
        assert await signer_of(authority) != signer.certificate
    clock.elapse(SETTLE)
    assert await signer_of(authority) == signer.certificate


async def test_a_signer_that_is_not_valid_yet_is_taken_when_it_is(tmp_path: Path) -> None:
    clock = HandClock()
    signer, root = hierarchy(0)
    authority = await opened(write(tmp_path, files_of(signer, root)), clock)
    early = make_ca("early", root, not_before=NOW + HOUR)
    write(tmp_path, files_of(early, root))
    with recorded() as events:
        for _ in range(3):
            assert await signer_of(authority) == signer.certificate
            clock.elapse(HOUR / 4)
        assert len(events.named("ca_refused")) == 1
        clock.elapse(HOUR / 4)
        assert await signer_of(authority) == early.certificate


async def test_a_bundle_of_which_only_the_first_root_is_written_takes_no_root_away(tmp_path: Path) -> None:
    """It is a good set by itself, and only time shows that it was not whole."""
    clock = HandClock()
    signer, root = hierarchy(0)
    other = make_ca("other").certificate
    both = with_roots((root.certificate, other), signer, root)
    authority = await opened(write(tmp_path, both), clock)
    write(tmp_path, files_of(signer, root))
    assert await roots(authority) == {root.certificate, other}
    write(tmp_path, both)
    clock.elapse(SETTLE)
    assert await roots(authority) == {root.certificate, other}
    write(tmp_path, files_of(signer, root))
    assert await roots(authority) == {root.certificate, other}
    clock.elapse(SETTLE)
    assert await roots(authority) == {root.certificate}


async def test_a_refusal_is_said_again_when_a_good_set_was_there_in_between(tmp_path: Path) -> None:
    files = files_of(*hierarchy(0))
    authority = await opened(write(tmp_path, files), HandClock())
    with recorded() as events:
        for _ in range(2):
            (tmp_path / "ca-key.pem").write_bytes(b"")
            await authority.anchors()
            await authority.anchors()
            write(tmp_path, files)
            await authority.anchors()
        assert len(events.named("ca_refused")) == 2
        assert events.named("ca_signs") == []


async def test_an_expired_signer_does_not_hold_up_its_successor(tmp_path: Path) -> None:
    root = make_ca("root", not_after=NOW + 9 * DAY)
    clock = HandClock()
    authority = await opened(write(tmp_path, files_of(make_ca("old", root), root)), clock)
    clock.elapse(2 * DAY)
    with pytest.raises(AuthorityError, match="expired on") as caught:
        await authority.issue(request())
    assert caught.value.kind is ErrorKind.DENIED
    new_root = make_ca("new root", not_after=NOW + 9 * DAY)
    successor = make_ca("new", new_root, not_after=NOW + 9 * DAY)
    write(tmp_path, files_of(successor, new_root))
    assert await signer_of(authority) == successor.certificate


async def test_a_wrong_directory_fails_before_the_agent_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a directory"):
        await opened(tmp_path / "nowhere", HandClock())
    root = make_ca("root")
    signer = make_ca("signer", root, constraints=uris(permitted=["other.example"]))
    with pytest.raises(ConfigurationError, match=r"permit 'other\.example'"):
        await opened(write(tmp_path, files_of(signer, root)), HandClock())


async def test_the_agent_reads_an_encrypted_key_and_reports_a_wrong_passphrase(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s  # noqa: PLC0415 - used here alone

    signer, root = hierarchy(0)
    encryption = s.BestAvailableEncryption(b" a secret ")
    encrypted = signer.key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, encryption)
    directory = write(tmp_path / "ca", {**files_of(signer, root), "ca-key.pem": encrypted})
    file = tmp_path / "passphrase"
    for ending in ("", "\n", "\r\n"):  # and nothing else of it is taken away
        file.write_bytes(f" a secret {ending}".encode())
        assert await signer_of(await opened(directory, HandClock(), file)) == signer.certificate
    file.write_text("wrong\n")
    with pytest.raises(ConfigurationError, match="the passphrase is wrong") as caught:
        await opened(directory, HandClock(), file)
    assert "wrong\n" not in str(caught.value)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigurationError, match="passphrase: it is a pipe, and not a file"):
        await opened(directory, HandClock(), file)


async def test_a_csr_that_proves_nothing_never_reaches_the_signer(tmp_path: Path) -> None:
    authority = await opened(write(tmp_path, files_of(*hierarchy(0))), HandClock())
    with pytest.raises(AuthorityError) as caught:
        await authority.issue(request(b"garbage"))
    assert caught.value.kind is ErrorKind.INVALID


async def test_a_key_that_was_made_in_this_process_is_certified_without_a_csr(tmp_path: Path) -> None:
    """A CSR made for it, and verified at once by who made it, costs an agent with thousands of identities as much as
    their certificates.
    """
    authority = await opened(write(tmp_path, files_of(*hierarchy(0))), HandClock())
    assert isinstance(authority, CertifiesKeys)
    key = generate(KeyType.EC_P256).public_key()
    issuance = await authority.certify(SpiffeId.parse(URI), key, HOUR)
    leaf, signer = read_pem(issuance.chain_pem)
    leaf.verify_directly_issued_by(signer)
    assert has_key(leaf, key)
    assert subject_alternative_uris(leaf) == (URI,)
    assert issuance.anchors_pem == await authority.anchors()


async def test_the_ca_advertises_every_root_of_its_directory(tmp_path: Path) -> None:
    signer, root = hierarchy(0)
    other = make_ca("other").certificate
    files = with_roots((other, root.certificate), signer, root)
    authority = await opened(write(tmp_path, files), HandClock())
    assert await roots(authority) == {other, root.certificate}
