"""Certificates in files that another program writes: served as they change, whole or not at all."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from fakes.clocks import HandClock
from fakes.configurations import MINIMAL, problems, settings
from fakes.der import pem
from fakes.events import recorded
from fakes.hierarchy import DAY, NOW, Ca, make_ca, make_leaf, new_key
from fakes.odd_certificates import NOT_READ
from fakes.replacing import WAYS, Replace, in_place
from msgspec import structs

from sds_agent.authority import registry
from sds_agent.authority.files import client
from sds_agent.authority.files.client import REMIND_EVERY_UNSERVED, FilesAuthority
from sds_agent.authority.files.contents import LAYOUTS
from sds_agent.authority.files.settings import FilesSettings
from sds_agent.authority.kind import Context
from sds_agent.authority.protocol import AnnouncesAnchors, AuthorityError, ErrorKind, Supplied, Supplier
from sds_agent.file_sets import CHECK_EVERY, LARGEST_FILE, PATIENCE, RETRY_EVERY
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.path_watch import PathWatch
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.keys import to_pkcs8_pem

WEB = SpiffeId.parse("spiffe://demo.example/web")
TIMES = 3
SOON = 10
"""Seconds, many times what any of it takes."""

Files = dict[str, bytes]


def secret(root: Ca, uri: str | None = str(WEB), **leaf: object) -> Files:
    """A new certificate under a signer of `root`, as Kubernetes names its parts."""
    signer, key = make_ca("signer", root), new_key()
    chain = [make_leaf(signer, uri, key=key, **leaf), signer.certificate]  # type: ignore[arg-type]  # keywords of make_leaf
    return {"tls.crt": write_pem(chain), "tls.key": to_pkcs8_pem(key), "ca.crt": write_pem([root.certificate])}


def leaf_in(files: Mapping[str, bytes]) -> x509.Certificate:
    return read_pem(files["tls.crt"])[0]


def leaf_of(supplied: Supplied) -> x509.Certificate:
    return read_pem(supplied.issuance.chain_pem)[0]


@asynccontextmanager
async def following(chosen: FilesSettings, clock: HandClock) -> AsyncIterator[FilesAuthority]:
    context = Context("upstream", "demo.example", Path("/nowhere"), clock)
    async with registry.kind("files").open(chosen, context) as authority:
        assert isinstance(authority, FilesAuthority)
        yield authority


async def next_of(authority: Supplier, held: Supplied | None = None) -> Supplied:
    with anyio.fail_after(SOON):
        return await authority.supply(WEB, None if held is None else held.issuance.chain_pem)


async def failure_of(authority: Supplier, clock: HandClock, held: bytes | None = None) -> AuthorityError:
    """The error that is raised once the agent's patience is over."""
    asked = asyncio.create_task(authority.supply(WEB, held))
    for _ in range(int(PATIENCE.total_seconds() / RETRY_EVERY) + 5):
        await clock.asleep()
        if asked.done():
            break
        clock.elapse(clock.next_wake)
    with pytest.raises(AuthorityError) as failed:
        await asked
    return failed.value


@pytest.fixture
def root() -> Ca:
    return make_ca("root")


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


# What is served


async def test_a_supplier_that_knows_when_its_roots_change(tmp_path: Path, clock: HandClock) -> None:
    async with following(FilesSettings(directory=tmp_path), clock) as authority:
        assert isinstance(authority, Supplier)
        assert isinstance(authority, AnnouncesAnchors)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.certificate)
async def test_every_known_layout_of_a_directory_is_read(
    layout: object, tmp_path: Path, root: Ca, clock: HandClock
) -> None:
    assert isinstance(layout, type(LAYOUTS[0]))
    files = secret(root)
    (tmp_path / layout.certificate).write_bytes(files["tls.crt"])
    (tmp_path / layout.key).write_bytes(files["tls.key"])
    (tmp_path / (layout.roots or "roots.pem")).write_bytes(files["ca.crt"])
    named = None if layout.roots else tmp_path / "roots.pem"
    async with following(FilesSettings(directory=tmp_path, roots_file=named), clock) as authority:
        given = await next_of(authority)
    assert leaf_of(given) == leaf_in(files)
    assert given.private_key_pem == files["tls.key"]
    assert given.issuance.anchors_pem == files["ca.crt"]


async def test_a_credential_bundle_is_one_file_with_the_key(tmp_path: Path, root: Ca, clock: HandClock) -> None:
    files = secret(root)
    bundle, roots = tmp_path / "credentials.pem", tmp_path / "roots.pem"
    bundle.write_bytes(files["tls.key"] + files["tls.crt"])
    roots.write_bytes(files["ca.crt"])
    async with following(FilesSettings(credential_file=bundle, roots_file=roots), clock) as authority:
        given = await next_of(authority)
        assert (given.issuance.chain_pem, given.private_key_pem) == (files["tls.crt"], files["tls.key"])
        files = secret(root)
        bundle.write_bytes(files["tls.key"] + files["tls.crt"])
        assert leaf_of(await next_of(authority, given)) == leaf_in(files)


@pytest.mark.parametrize("form", ["sec1", "encrypted"])
async def test_keys_in_other_forms_are_given_out_as_plain_pkcs8(
    form: str, tmp_path: Path, root: Ca, clock: HandClock
) -> None:
    key = new_key()
    lock = BestAvailableEncryption(b"word") if form == "encrypted" else NoEncryption()
    kind = PrivateFormat.PKCS8 if form == "encrypted" else PrivateFormat.TraditionalOpenSSL
    parts = {
        "crt": write_pem([make_leaf(root, str(WEB), key=key)]),
        "key": key.private_bytes(Encoding.PEM, kind, lock),
        "roots": write_pem([root.certificate]),
        "word": b"word\nand notes",
    }
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    chosen = FilesSettings(
        certificate_file=tmp_path / "crt",
        key_file=tmp_path / "key",
        roots_file=tmp_path / "roots",
        password_file=tmp_path / "word" if form == "encrypted" else None,
    )
    async with following(chosen, clock) as authority:
        assert (await next_of(authority)).private_key_pem == to_pkcs8_pem(key)


@pytest.mark.parametrize("way", WAYS)
async def test_each_replacement_is_served_however_it_is_made_again_and_again(
    way: Callable[[Path], tuple[Path, Replace]], tmp_path: Path, root: Ca, clock: HandClock
) -> None:
    """The clock stands still: the kernel tells of each."""
    directory, replace = way(tmp_path)
    replace(secret(root))
    async with following(FilesSettings(directory=directory), clock) as authority:
        given = await next_of(authority)
        for _ in range(TIMES):
            files = secret(root)
            replace(files)
            given = await next_of(authority, given)
            assert leaf_of(given) == leaf_in(files)
            assert given.private_key_pem == files["tls.key"]


@pytest.mark.parametrize("way", WAYS)
async def test_each_replacement_is_served_where_the_kernel_tells_nothing(
    way: Callable[[Path], tuple[Path, Replace]],
    tmp_path: Path,
    root: Ca,
    clock: HandClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network's disk, or no watch left: a reading every few seconds finds it."""
    monkeypatch.setattr(PathWatch, "arm", lambda *_: None)
    directory, replace = way(tmp_path)
    replace(secret(root))
    async with following(FilesSettings(directory=directory), clock) as authority:
        given = await next_of(authority)
        for _ in range(TIMES):
            await clock.asleep()
            files = secret(root)
            replace(files)
            clock.elapse(timedelta(seconds=CHECK_EVERY))
            given = await next_of(authority, given)
            assert leaf_of(given) == leaf_in(files)


async def test_files_that_come_after_the_start_are_served(tmp_path: Path, root: Ca, clock: HandClock) -> None:
    directory = tmp_path / "a" / "b"
    async with following(FilesSettings(directory=directory), clock) as authority:
        asked = asyncio.create_task(next_of(authority))
        await clock.asleep()
        directory.mkdir(parents=True)
        files = secret(root)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        assert leaf_of(await asked) == leaf_in(files)


async def test_the_same_content_is_not_given_again(tmp_path: Path, root: Ca, clock: HandClock) -> None:
    """Touched or rewritten, an unchanged certificate is no renewal."""
    directory, replace = in_place(tmp_path)
    replace(files := secret(root))
    async with following(FilesSettings(directory=directory), clock) as authority:
        given = await next_of(authority)
        asked = asyncio.create_task(next_of(authority, given))
        replace(files)
        await clock.asleep(1)
        replace(newer := secret(root))
        assert leaf_of(await asked) == leaf_in(newer)


@pytest.mark.parametrize("usable", [True, False])
async def test_new_roots_are_announced_without_a_new_certificate(
    tmp_path: Path, root: Ca, clock: HandClock, *, usable: bool
) -> None:
    """One that cannot be used too: somebody has to hear that peers below it are refused (`anchors_left_out`)."""
    directory, replace = in_place(tmp_path)
    replace(files := secret(root))
    async with following(FilesSettings(directory=directory), clock) as authority:
        assert await authority.anchors() == files["ca.crt"]
        announced = asyncio.create_task(authority.anchors_changed())
        await clock.asleep()
        assert not announced.done()
        other = write_pem([make_ca("next").certificate]) if usable else pem(NOT_READ["_ in PrintableString"])
        both = files["ca.crt"] + other
        (directory / "ca.crt").write_bytes(both)
        with anyio.fail_after(SOON):
            await announced
        assert await authority.anchors() == both


# What is not served


async def test_a_set_that_is_half_written_keeps_the_old_one_without_a_word(
    tmp_path: Path, root: Ca, clock: HandClock
) -> None:
    directory, replace = in_place(tmp_path)
    replace(secret(root))
    async with following(FilesSettings(directory=directory), clock) as authority:
        given = await next_of(authority)
        asked = asyncio.create_task(next_of(authority, given))
        files = secret(root)
        (directory / "tls.crt").write_bytes(files["tls.crt"][:200])
        await clock.asleep()
        (directory / "tls.crt").write_bytes(files["tls.crt"])
        await clock.asleep()
        clock.elapse(PATIENCE - timedelta(seconds=1))
        await clock.asleep()
        assert not asked.done()
        (directory / "tls.key").write_bytes(files["tls.key"])
        assert leaf_of(await asked) == leaf_in(files)


async def test_a_set_that_stays_torn_is_an_error_once_and_is_served_as_soon_as_it_is_whole(
    tmp_path: Path, root: Ca, clock: HandClock
) -> None:
    directory, replace = in_place(tmp_path)
    replace(secret(root))
    async with following(FilesSettings(directory=directory), clock) as authority:
        given = await next_of(authority)
        files = secret(root)
        (directory / "tls.crt").write_bytes(files["tls.crt"])
        failed = await failure_of(authority, clock, given.issuance.chain_pem)
        assert failed.kind is ErrorKind.INVALID
        assert "no certificate in it has the key" in str(failed)
        again = asyncio.create_task(next_of(authority))  # as issuance asks after an error
        await clock.asleep()
        assert not again.done()
        (directory / "tls.key").write_bytes(files["tls.key"])
        assert leaf_of(await again) == leaf_in(files)


async def test_an_error_that_lasts_is_said_again(tmp_path: Path, clock: HandClock) -> None:
    async with following(FilesSettings(directory=tmp_path), clock) as authority:
        first, began = await failure_of(authority, clock), clock.now()
        with anyio.fail_after(SOON):
            second = await failure_of(authority, clock)
        assert str(second) == str(first)
        assert clock.now() - began >= REMIND_EVERY_UNSERVED


def _without(name: str) -> Callable[[Files], Files]:
    return lambda files: {each: content for each, content in files.items() if each != name}


def _with(name: str, content: bytes) -> Callable[[Files], Files]:
    return lambda files: {**files, name: content}


BAD: dict[str, tuple[Callable[[Files], Files], str]] = {
    "no key": (_without("tls.key"), "tls.key cannot be read: No such file or directory"),
    "no certificate": (_without("tls.crt"), "holds no certificate under a known name"),
    "no roots": (_without("ca.crt"), "ca.crt cannot be read: No such file or directory"),
    "no PEM": (_with("tls.crt", b"x"), "tls.crt holds no certificate: there is no PEM block in it"),
    "another key": (_with("tls.key", to_pkcs8_pem(new_key())), "no certificate in it has the key"),
    "empty roots": (_with("ca.crt", b""), "ca.crt holds no certificate"),
    "damaged roots": (_with("ca.crt", b"-----BEGIN CERTIFICATE-----\n"), "ca.crt cannot be read: PEM block 1"),
    "a huge file": (_with("ca.crt", b"x" * (LARGEST_FILE + 1)), "ca.crt cannot be read: it has more than"),
}


@pytest.mark.parametrize(("spoil", "said"), BAD.values(), ids=BAD)
async def test_what_is_wrong_is_said_with_the_file(
    spoil: Callable[[Files], Files], said: str, tmp_path: Path, root: Ca, clock: HandClock
) -> None:
    for name, content in spoil(secret(root)).items():
        (tmp_path / name).write_bytes(content)
    async with following(FilesSettings(directory=tmp_path), clock) as authority:
        failed = await failure_of(authority, clock)
        assert said in str(failed)
        with pytest.raises(AuthorityError, match="; "):
            await authority.anchors()


async def test_a_certificate_without_the_spiffe_id_is_named_with_what_it_has(
    tmp_path: Path, root: Ca, clock: HandClock
) -> None:
    for name, content in secret(root, None, names=[x509.DNSName("web.example")]).items():
        (tmp_path / name).write_bytes(content)
    async with following(FilesSettings(directory=tmp_path), clock) as authority:
        failed = await failure_of(authority, clock)
    assert failed.kind is ErrorKind.MISMATCH
    assert f"must have the URI {WEB}" in str(failed)
    assert "has: DNSName 'web.example'" in str(failed)


async def test_a_pipe_in_the_place_of_a_file_holds_nothing_up(tmp_path: Path, root: Ca, clock: HandClock) -> None:
    for name, content in _without("tls.key")(secret(root)).items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "tls.key")
    async with following(FilesSettings(directory=tmp_path), clock) as authority:
        assert "tls.key cannot be read: it is a pipe" in str(await failure_of(authority, clock))


async def test_a_bug_that_some_content_meets_ends_nothing(
    tmp_path: Path, root: Ca, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another program writes must not end the agent; it is reported once for each content."""
    directory, replace = in_place(tmp_path)
    replace(files := secret(root))
    with recorded() as events, monkeypatch.context() as patched:
        patched.setattr(client, "judged", {}.__getitem__)
        async with following(FilesSettings(directory=directory), clock) as authority:
            assert "they led to a TypeError" in str(await failure_of(authority, clock))
            assert len(events.named("fault")) == 1
            patched.undo()
            replace(files := secret(root))
            assert leaf_of(await next_of(authority)) == leaf_in(files)


async def test_no_key_is_shown(tmp_path: Path, root: Ca, clock: HandClock) -> None:
    files = secret(root)
    files["tls.key"] = files["tls.key"][:-40]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    shown = files["tls.key"].split(b"\n")[1].decode()[:30]
    async with following(FilesSettings(directory=tmp_path), clock) as authority:
        failed = await failure_of(authority, clock)
        assert shown not in f"{failed} {failed!r} {client.read_files(FilesSettings(directory=tmp_path))!r}"


# The configuration

KEYS = {
    "": [("certificate_file", "is missing")],
    "certificate_file: a, roots_file: r": [("key_file", "is missing")],
    "certificate_file: a, key_file: k": [("roots_file", "is missing")],
    "credential_file: a, key_file: k, roots_file: r": [("key_file", "is given beside credential_file")],
    "directory: d, credential_file: a": [("credential_file", "is given beside directory")],
    "directory: 7": [("directory", "is the number 7")],
    "directory: d": [],
    "directory: d, roots_file: r, password_file: w": [],
    "credential_file: a, roots_file: r": [],
    "certificate_file: a, key_file: k, roots_file: r": [],
}


@pytest.mark.parametrize("keys", KEYS)
def test_keys_that_do_not_go_together_are_named(keys: str, tmp_path: Path) -> None:
    found = problems(tmp_path, f"{MINIMAL}authorities: {{upstream: {{type: files, {keys}}}}}\n")
    assert [(each.key.removeprefix("authorities.upstream."), each.found) for each in found] == KEYS[keys]


def test_a_second_workload_needs_files_of_its_own(tmp_path: Path) -> None:
    second = "  - {name: db, spiffe_id: 'spiffe://demo.example/db'}\n"
    (found,) = problems(tmp_path, f"{MINIMAL}{second}authorities: {{upstream: {{type: files, directory: d}}}}\n")
    assert found.key == "workloads[1].spiffe_id"
    assert "a second identity from the authority upstream" in found.found


def credentials(folder: Path) -> list[str]:
    chosen = settings(folder, f"{MINIMAL}authorities: {{upstream: {{type: files, directory: .}}}}\n")
    read = chosen.authorities["upstream"]
    kind = registry.kind_of(read)
    return [str(each) for each in kind.credentials(read, Context("upstream", "demo.example", folder, HandClock()))]


def test_what_is_wrong_is_said_before_the_first_certificate(tmp_path: Path, root: Ca) -> None:
    (found,) = credentials(tmp_path)
    assert "holds no certificate under a known name" in found
    expired = secret(root, not_before=NOW - 2 * DAY, not_after=NOW - DAY)
    for name, content in expired.items():
        (tmp_path / name).write_bytes(content)
    (late,) = credentials(tmp_path)
    assert "expired at 2026-03-13" in late
    for name, content in secret(root).items():
        (tmp_path / name).write_bytes(content)
    assert credentials(tmp_path) == []


def test_every_key_that_names_a_secret_is_a_key() -> None:
    assert set(registry.kind("files").secrets) <= {field.name for field in structs.fields(FilesSettings)}
