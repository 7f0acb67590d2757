"""The configuration file while the agent runs: it is followed, and what it says is applied, or refused in words.

A file is refused as a whole, and the configuration in force stays. All that can fail comes first: reading the file,
comparing it, the credentials of the authorities that are new or another, and opening those. Then the agent becomes what
it says (`Agent.apply`), and the authorities that were replaced are closed. A refusal whose cause lies outside of the
file, such as a credential that is not there yet, is tried again every few seconds.
"""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from sds_agent import log, preflight, sources
from sds_agent.authority.kind import AuthoritySettings
from sds_agent.clock import Clock
from sds_agent.config.changes import SettingsChange, difference
from sds_agent.config.settings import Settings
from sds_agent.digest import sha256
from sds_agent.errors import ProblemsError, SdsAgentError
from sds_agent.files import read_at_once
from sds_agent.live import assembly
from sds_agent.live.agent import Agent
from sds_agent.live.file_turn import FileTurn
from sds_agent.live.opening import OpenAuthorities, OpenAuthority
from sds_agent.live.origin import ConfigSource, ReloadHooks
from sds_agent.live.workloads import import_outputs
from sds_agent.path_watch import PathWatch
from sds_agent.tasks import DISK_TIMEOUT, NoThreadError, TimeLimit, in_thread

if TYPE_CHECKING:
    from sds_agent.sds.permissions import Rules

LOG = logging.getLogger(__name__)

OPENING = 30.0
"""Seconds that an authority may take to open."""
LARGEST_FILE = 1 << 20
"""Bytes, as `configfile.source` has it."""


class _RefusedError(SdsAgentError):
    """The new configuration cannot be applied. `final`: not before the file changes."""

    def __init__(self, causes: tuple[str, ...], *, final: bool) -> None:
        super().__init__("; ".join(causes))
        self.causes = causes
        self.final = final


class _Examined(Struct, frozen=True):
    """What the files of authorities are like: what keeps them from being used, and what is only warned of."""

    unusable: tuple[str, ...]
    exposed: tuple[str, ...]
    shared: tuple[tuple[str, str], ...]


class Reload:
    """Follows the file of an agent. Without one there is nothing to reload, and the log says so when asked."""

    def __init__(
        self,
        agent: Agent,
        cas: OpenAuthorities,
        origin: ConfigSource | None,
        clock: Clock,
        hooks: ReloadHooks | None = None,
        *,
        opening: float = OPENING,
    ) -> None:
        """An authority has `opening` seconds to open, and as many for its files to be read before that."""
        self._agent = agent
        self._cas = cas
        self._origin = origin
        self._clock = clock
        self._hooks = hooks or ReloadHooks()
        self._disk = TimeLimit(DISK_TIMEOUT)
        self._accounts = TimeLimit(DISK_TIMEOUT)
        self._opening = opening
        self._examined: Mapping[str, AuthoritySettings] = {}
        self._examination = TimeLimit(opening)
        self._refused = log.LogOnChange(LOG, "reload_refused")

    async def run(self, asked: asyncio.Event) -> None:
        """Reload when the file has changed and whenever `asked` is set, which this clears, until cancelled."""
        if self._origin is None:
            while True:
                await asked.wait()
                asked.clear()
                self._hooks.begins()
                log.event(LOG, "nothing_to_reload", cause="there is no configuration file to read again")
                self._hooks.ends()
        watch = PathWatch()
        try:
            await self._follow(self._origin, watch, asked)
        finally:
            watch.close()

    async def _follow(self, origin: ConfigSource, watch: PathWatch, asked: asyncio.Event) -> None:
        turn = FileTurn(origin.digest, self._clock.now(), judged=bool(origin.digest))
        while True:
            is_asked = asked.is_set()
            asked.clear()
            if is_asked:
                self._hooks.begins()
            turn = turn.read(await self._digest(origin.file, watch), self._clock.now())
            if turn.due(self._clock.now(), asked=is_asked):
                turn = await self._judge(origin, turn, asked=is_asked)
            if is_asked:
                self._hooks.ends()
            await self._changed(watch, asked, turn.pause)

    async def _changed(self, watch: PathWatch, asked: asyncio.Event, seconds: float) -> None:
        waits = [asyncio.create_task(watch.changed(self._clock, seconds)), asyncio.create_task(_set(asked))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
            await asyncio.wait(waits)

    async def _digest(self, file: Path, watch: PathWatch | None = None) -> bytes:
        """A hash of the file's content; empty where it cannot be read, which loading it explains."""

        def read() -> bytes:
            if watch is not None:
                watch.arm([file])
            return sha256(read_at_once(file, LARGEST_FILE))

        try:
            return await self._disk.call(read)
        except (OSError, NoThreadError):
            return b""

    async def _judge(self, origin: ConfigSource, turn: FileTurn, *, asked: bool) -> FileTurn:
        """Apply what the file says, or say why not; returns whether that is for good."""
        try:
            change = await self._take(origin, turn, asked=asked)
        except _RefusedError as error:
            if not turn.reports(self._clock.now(), asked=asked):
                return turn
            if asked:
                self._refused.resolved()  # who asks is answered, whatever was said before
            self._refused.report(error.causes, file=str(origin.file), serving="the configuration before")
            self._agent.reload_refused = error.causes
            return structs.replace(turn, judged=error.final, tried=True)
        if not change and (asked or self._agent.reload_refused):
            log.event(LOG, "nothing_to_reload", cause=f"{origin.file} says what is in force")
        self._refused.resolved()
        self._agent.reload_refused = ()
        return structs.replace(turn, judged=True)

    async def _take(self, origin: ConfigSource, turn: FileTurn, *, asked: bool) -> SettingsChange:
        """Apply what the file says. Raises _RefusedError, and then nothing has changed."""
        monotonic = asyncio.get_running_loop().time
        began = monotonic()
        settings = await self._loaded(origin)
        if not asked and await self._digest(origin.file) != turn.digest:
            raise _RefusedError((f"{origin.file} changes all the time",), final=False)
        change = difference(self._agent.settings, settings)
        if change.refusals:
            raise _RefusedError(change.refusals, final=True)
        rules = await self._rules(settings)
        if not change:
            self._agent.sds.permit(rules)  # users and groups may have other ids by now
            return change
        await self._prepare(settings)
        fresh = await self._opened(settings, change)
        closing = self._cas.replace(fresh, change.to_close)
        await self._agent.apply(settings, {name: self._cas[name] for name in settings.authorities}, rules)
        for each in closing:
            each.begin_to_close()
        if "log" in change.keys:
            origin.relog(settings.log)
        _report(change, str(origin.file), round((monotonic() - began) * 1000, 1))
        return change

    async def _loaded(self, origin: ConfigSource) -> Settings:
        try:
            return await self._disk.call(origin.load)
        except ProblemsError as error:
            raise _RefusedError(tuple(map(str, error.problems)), final=True) from error
        except (OSError, SdsAgentError) as error:
            raise _RefusedError((f"{origin.file} cannot be read: {error}",), final=False) from error
        except Exception as error:  # a library that was upgraded meanwhile must not end the agent
            raise _fault(f"reading {origin.file}", error) from error

    async def _prepare(self, settings: Settings) -> None:
        """Import what applying the file may import: that must not fail half way."""
        if not assembly.written(settings):
            return
        try:
            await in_thread(import_outputs)
        except NoThreadError as error:
            raise _RefusedError((str(error),), final=False) from error
        except Exception as error:  # a library that was upgraded meanwhile must not end the agent
            raise _fault("importing what writes outputs", error) from error

    async def _rules(self, settings: Settings) -> "Rules":
        """Who may have which secret. Raises _RefusedError; a user who is not on this machine may come."""
        if all(each.clients is None for each in settings.workloads):
            return {}
        try:
            return await self._accounts.call(preflight.client_rules, settings)
        except ProblemsError as error:
            raise _RefusedError(tuple(map(str, error.problems)), final=False) from error
        except TimeoutError as error:
            cause = f"the users and groups of workloads[].clients cannot be looked up: {error.strerror}"
            raise _RefusedError((cause,), final=False) from error
        except NoThreadError as error:
            raise _RefusedError((str(error),), final=False) from error
        except Exception as error:  # a library that was upgraded meanwhile must not end the agent
            raise _fault("looking up the users and groups of workloads[].clients", error) from error

    async def _opened(self, settings: Settings, change: SettingsChange) -> dict[str, OpenAuthority]:
        """The authorities that are new or another. Where one cannot be opened, none is."""
        chosen = {name: settings.authorities[name] for name in change.to_open}
        if not chosen:
            return {}
        only = structs.replace(settings, authorities=chosen)
        examined = await self._examine(only)
        fresh = dict[str, OpenAuthority]()
        try:
            for name in chosen:
                fresh[name] = await self._open(settings, name)
        except _RefusedError:
            for opened in fresh.values():
                opened.begin_to_close()
            raise
        sources.report_shared(examined.shared)
        sources.report_credentials(examined.exposed)
        return fresh

    async def _examine(self, only: Settings) -> _Examined:
        """What there is to say of the authorities' files. Raises _RefusedError where they cannot be used."""
        if only.authorities != self._examined:  # what hangs with the files of some is no reason to refuse others
            self._examined, self._examination = only.authorities, TimeLimit(self._opening)

        def examine() -> _Examined:
            return _Examined(
                tuple(preflight.unusable_credentials(only, self._clock)),
                tuple(preflight.exposed(only)),
                tuple(sources.find_shared(preflight.authority_sources(only))),
            )

        names = " and ".join(f"authorities.{name}" for name in only.authorities)
        try:
            found = await self._examination.call(examine)
        except TimeoutError as error:
            cause = f"the files of {names} cannot be read: {error.strerror}; check that their disk is there"
            raise _RefusedError((cause,), final=False) from error
        except NoThreadError as error:
            raise _RefusedError((str(error),), final=False) from error
        except Exception as error:  # a bug in one adapter must not end the agent
            raise _fault(f"examining the files of {names}", error) from error
        if found.unusable:
            raise _RefusedError(found.unusable, final=False)
        return found

    async def _open(self, settings: Settings, name: str) -> OpenAuthority:
        key, limit = f"authorities.{name}", asyncio.timeout(self._opening)
        try:
            async with limit:
                context = preflight.context(settings, name, self._clock)
                return await self._cas.opened(settings.authorities[name], context)
        except SdsAgentError as error:
            cause = str(error)
        except Exception as error:  # noqa: BLE001 - a bug in one adapter must not end the agent
            cause = f"{key} could not be opened within {self._opening:g} s"
            if not limit.expired():
                log.fault(LOG, f"authority {name}", error)
                cause = f"opening {key} led to a {type(error).__name__}; please report the event fault"
        raise _RefusedError((cause,), final=False)


def _fault(doing: str, error: Exception) -> _RefusedError:
    """The refusal for an exception that no code foresaw, which is logged."""
    log.fault(LOG, "reload", error)
    words = (
        f"{doing} led to the fault {type(error).__name__}; if sds-agent or a library was upgraded, restart the agent"
    )
    return _RefusedError((words,), final=True)


async def _set(event: asyncio.Event) -> None:
    await event.wait()


def _report(change: SettingsChange, file: str, took_ms: float) -> None:
    workloads, authorities = change.workloads, change.authorities
    log.event(
        LOG,
        "reloaded",
        file=file,
        keys=change.keys,
        workloads_added=workloads.added or None,
        workloads_removed=workloads.removed or None,
        workloads_changed=workloads.changed or None,
        authorities_added=authorities.added or None,
        authorities_removed=authorities.removed or None,
        authorities_changed=authorities.changed or None,
        took_ms=took_ms,
    )
