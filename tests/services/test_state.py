"""The state directory is removed or replaced under a running agent: it comes back, or the log says what is wrong."""

import asyncio
import json
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from fakes.authorities import embedded
from fakes.clocks import HandClock
from fakes.configurations import MINIMAL, settings
from fakes.events import Events, recorded

from sds_agent import app
from sds_agent.authority.in_process import StoredAuthority
from sds_agent.authority.protocol import AuthorityError
from sds_agent.clock import SystemClock
from sds_agent.directories import LockedDirectory, NotLockedError, locked_directory
from sds_agent.errors import SdsAgentError
from sds_agent.issuance.anchors_file import AnchorsFile, StoredAnchors
from sds_agent.issuance.cache import CachedCertificate, CacheError, CertificateCache
from sds_agent.state import Restorable, RestorableFiles, restore, watch

LIFETIME = timedelta(days=10)
CACHED = CachedCertificate("spiffe://demo.example/web", 0.0, "chain", "anchors", "PLANTED PRIVATE KEY")
ROOTS = "authorities/local/roots.pem"


def files(directory: Path) -> dict[str, bytes]:
    """The content of every file below, by its path from there."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def locked(directory: Path) -> Iterator[LockedDirectory]:
    with locked_directory(directory, "state_dir", SdsAgentError("another agent runs there")) as claimed:
        yield claimed


async def ca(directory: Path, clock: HandClock | None = None) -> StoredAuthority:
    return await embedded(directory / "authorities" / "local", clock or HandClock(), lifetime=LIFETIME)


def keeper(directory: Path) -> CertificateCache:
    made = CertificateCache(directory / "certificates")
    made.save(CACHED)
    return made


@asynccontextmanager
async def watching(directory: Path) -> AsyncIterator[Events]:
    """An agent's state with a CA and a certificate in it, and the watch over both."""
    with locked(directory) as claimed, recorded() as events:
        parts: list[Restorable | RestorableFiles] = [await ca(directory), keeper(directory)]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, claimed, lambda: parts, 0.01)
            yield events
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize("lost", [".", "lock", "authorities", ROOTS, "certificates"])
async def test_state_that_is_removed_comes_back_as_it_was(tmp_path: Path, lost: str) -> None:
    """Else the next start makes another root, and every peer on other machines refuses this one."""
    directory = tmp_path / "state"
    async with watching(directory) as events:
        before, path = files(directory), directory / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        reported = await events.wait("state_restored", level="warning", directory=str(directory))
        assert files(directory) == before
        assert {str(directory / each) for each in before if lost in {".", each} or each.startswith(lost)} == set(
            reported["files"]
        )
        with pytest.raises(SdsAgentError, match="another agent runs there"), locked(directory):
            pass
        assert events.named("state_lost") == []


async def test_state_that_was_moved_away_and_brought_back_is_locked_again(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    async with watching(directory) as events:
        before = files(directory)
        directory.rename(tmp_path / "away")
        await events.wait("state_restored")
        shutil.rmtree(directory)
        (tmp_path / "away").rename(directory)
        await events.wait("state_restored", files=[str(directory / "lock")])
        assert files(directory) == before


async def test_second_agent_that_began_on_the_empty_directory_is_reported_and_not_overwritten(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "state"
    with locked(directory) as claimed, recorded() as events:
        first = await ca(directory)
        shutil.rmtree(directory)
        with locked(directory):
            await ca(directory)
            others = files(directory)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch, claimed, lambda: [first], 0.001)
                reported = await events.wait("state_lost", level="error")
                assert reported["cause"] == "another agent runs there"
                tasks.cancel_scope.cancel()
            assert files(directory) == others
        restored, faults = restore(claimed, [first])
        assert restored == [directory / "lock"]
        assert len(faults) == 1
        assert faults[0].startswith(
            f"{directory / ROOTS} holds other roots than those that this process signs with; stop"
        )
        assert files(directory) == others, "and not even then"


def all_stored(directory: Path) -> bool:
    """Whether an agent that has its first certificate has nothing more to write."""
    anchors = directory / "anchors.json"
    needed = anchors.exists() and json.loads(anchors.read_bytes())["needed"]
    return bool(needed and list(directory.glob("certificates/*.json")))


def test_a_lock_that_is_released_while_another_thread_looks_at_it_is_not_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch claims the directory anew while a certificate is written: what is stored later is no fault."""
    with locked(tmp_path / "state") as claimed:
        look = Path.lstat

        def released_meanwhile(path: Path) -> os.stat_result:
            found = look(path)
            claimed.release()
            return found

        monkeypatch.setattr(Path, "lstat", released_meanwhile)
        with pytest.raises(NotLockedError):
            claimed.check_in_place()


async def test_what_a_second_agent_stores_is_not_overwritten_by_what_the_first_one_renews(tmp_path: Path) -> None:
    """The second one would serve the first one's certificate after a restart, below a root that no peer has from it."""
    text = f"{MINIMAL}state_dir: {tmp_path}/state\nsds: {{socket: {tmp_path}/sds.sock}}\n"
    chosen, clock, directory = settings(tmp_path, text), SystemClock(), tmp_path / "state"
    with locked(directory) as claimed, recorded() as events:
        async with app.authorities(chosen, clock) as cas, app.agent(chosen, cas, clock, claimed) as running:
            with anyio.fail_after(20):
                while not all_stored(directory):
                    await anyio.lowlevel.checkpoint()
            (cache,) = (each for each in running.restorable if isinstance(each, CertificateCache))
            (anchors,) = (each for each in running.restorable if isinstance(each, AnchorsFile))
            shutil.rmtree(directory)
            with locked(directory):
                others = files(directory)
                with pytest.raises(CacheError, match=f"{directory}/lock is gone, or is not the one"):
                    cache.save(CACHED)
                assert not await anchors.save(StoredAnchors())
                assert files(directory) == others
            said = events.named("anchors_not_kept")[-1]["cause"]
            assert said.startswith(f"cannot write the anchors to {directory}/anchors.json: {directory}/lock is gone")
            restore(claimed, running.restorable)
            cache.save(CACHED)
            assert await anchors.save(StoredAnchors())


async def test_other_roots_are_not_overwritten_by_a_renewal(tmp_path: Path) -> None:
    clock = HandClock()
    first = await ca(tmp_path, clock)
    shutil.rmtree(tmp_path / "authorities")
    await ca(tmp_path, clock)
    others = files(tmp_path)
    clock.elapse(LIFETIME * 0.85)
    with recorded() as events:
        await first.anchors()
        (reported,) = events.named("root_not_renewed")
        assert "holds other roots than those that this process signs with" in reported["cause"]
    clock.elapse(LIFETIME)
    with pytest.raises(AuthorityError, match="holds other roots"):
        await first.anchors()
    assert files(tmp_path) == others


async def test_state_that_cannot_be_put_back_is_reported_by_its_place_and_the_rest_comes_back(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    with locked(directory) as claimed:
        parts: list[Restorable | RestorableFiles] = [await ca(directory), keeper(directory)]
        shutil.rmtree(directory)
        directory.mkdir(0o700)
        (directory / "authorities").write_text("in the way")
        restored, faults = restore(claimed, parts)
        assert [path.parent.name for path in restored] == ["state", "certificates"]
        assert faults == [f"the self-signed CA cannot store its roots in {directory / ROOTS}: Not a directory"]
        (directory / "authorities").unlink()
        assert restore(claimed, parts) == ([directory / ROOTS], [])
        assert restore(claimed, parts) == ([], [])


class Hanging:
    """A part whose disk does not answer until the test lets it."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answer = threading.Event()
        self._loop = asyncio.get_running_loop()

    def put_back(self) -> Path | None:
        self._loop.call_soon_threadsafe(self.asked.set)
        if not self.answer.wait(10):
            raise SdsAgentError("the loop stood still")
        return None


async def test_a_disk_that_does_not_answer_holds_up_nothing_else(tmp_path: Path) -> None:
    """As one of the network that is gone: the agent serves from memory."""
    with locked(tmp_path) as claimed, recorded() as events:
        part = Hanging()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, claimed, lambda: [part], 0.001)
            await part.asked.wait()
            part.answer.set()
            part.asked.clear()
            await part.asked.wait()
            tasks.cancel_scope.cancel()
        assert events.seen == []
