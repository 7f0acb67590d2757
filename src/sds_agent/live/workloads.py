"""The workloads that are served: an issuer for each, and what writes its output, in tasks that end by themselves.

A workload is the same one for as long as its identity is. Where its configuration changes, its issuer ends, and the
next one takes the certificates over: nothing is served anew, and nothing asked for before it is due.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping

from sds_agent.clock import Clock
from sds_agent.issuance.attempts import AttemptRecord
from sds_agent.issuance.cache import CertificateCache, WorkloadCache
from sds_agent.issuance.counts import IssuanceCounts
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.publication import PublicationTarget
from sds_agent.live.assembly import Issuing, Written
from sds_agent.secrets.model import Secret
from sds_agent.tasks import BackgroundTask, Start, ended

STARTED_AT_ONCE = 16
"""Issuers that start in one turn of the event loop."""


class _Output:
    """The tasks that write a workload's output, and what its hooks hear of attempts."""

    def __init__(
        self, written: Written, tasks: list[BackgroundTask], attempted: Callable[[AttemptRecord], None]
    ) -> None:
        self.written = written
        self.tasks = tasks
        self.attempted = attempted


class _Running:
    """One workload. Its output comes and goes without its issuer."""

    def __init__(self, issuing: Issuing, issuer: Issuer) -> None:
        self.issuing = issuing
        self.issuer = issuer
        self.task: BackgroundTask | None = None
        self.is_ending = False
        """Whether it is not to be started any more."""
        self.output: _Output | None = None
        issuer.watch_attempts(self._heard)

    def _heard(self, attempt: AttemptRecord) -> None:
        if self.output is not None:
            self.output.attempted(attempt)


class RunningWorkloads:
    """The workloads by their names, in the order of the configuration."""

    def __init__(
        self,
        target: PublicationTarget,
        clock: Clock,
        counts: IssuanceCounts,
        cache: CertificateCache | None,
        attempted: Callable[[AttemptRecord], None] | None = None,
    ) -> None:
        """`cache` is where their certificates are cached; None where they are not to be."""
        self._target = target
        self._clock = clock
        self._counts = counts
        self.cache = cache
        self._attempted = attempted
        self._running: dict[str, _Running] = {}

    @property
    def issuers(self) -> dict[str, Issuer]:
        """What issues for each."""
        return {name: each.issuer for name, each in self._running.items()}

    def each_issuer(self) -> Iterator[Issuer]:
        """The same, each when it is taken: others may have come in their places between two of them."""
        for name in tuple(self._running):
            if (running := self._running.get(name)) is not None:
                yield running.issuer

    async def stop(self, issuing: Mapping[str, Issuing], written: Mapping[str, Written]) -> None:
        """End what is another in these, or not in them. All of that is still served; `replace` is to follow."""
        tasks = list[BackgroundTask]()
        for name, each in self._running.items():
            if name not in issuing or not each.issuing.same(issuing[name]):
                each.is_ending = True  # thousands start in their own time, also while this waits
                tasks += [] if each.task is None else [each.task]
            if each.output is not None and each.output.written != written.get(name):
                tasks += each.output.tasks
        await ended(tasks)

    def replace(self, issuing: Mapping[str, Issuing]) -> dict[str, Secret | None]:
        """Have these workloads from now on; returns what is served under the names of those that are new or another.

        Those whose identity there was before go on with its certificates, under whatever name.
        """
        before, self._running = self._running, {}
        former = {str(each.issuing.workload.identity): each for each in before.values()}
        secrets = dict[str, Secret | None]()
        for name, wanted in issuing.items():
            known = before.get(name)
            if known is not None and known.issuing.same(wanted):
                self._running[name] = known
            else:
                self._running[name] = self._made(wanted, former.get(str(wanted.workload.identity)), known)
                secrets |= dict.fromkeys(wanted.workload.names, self._running[name].issuer.secret)
        there = {str(each.issuing.workload.identity) for each in self._running.values()}
        for identity, each in former.items():
            if identity not in there:
                each.issuer.leave()
                if self.cache is not None:
                    self.cache.forget(each.issuing.workload.identity)
        return secrets

    def _made(self, issuing: Issuing, former: _Running | None, namesake: _Running | None) -> _Running:
        cache = None if self.cache is None else WorkloadCache(issuing.workload, self.cache)
        running = _Running(issuing, issuing.issuer(self._target, self._clock, cache, self._counts))
        if self._attempted is not None:
            running.issuer.watch_attempts(self._attempted)
        if former is not None and former.issuer.has_begun:  # else a cached certificate is still to be looked for
            running.issuer.take_over(former.issuer, former.issuing.workload.cas)
        if namesake is not None:
            running.output = namesake.output
        return running

    def start_issuing(self, start: Start) -> None:
        """Start what does not run yet: the first of it at once, and the rest a few in each turn of the event loop, for
        each looks for its cached certificate, and Envoys are to be served meanwhile.
        """
        waiting = [each for each in self._running.values() if each.task is None]
        for each in waiting[:STARTED_AT_ONCE]:
            each.task = start(each.issuer.run())
        if len(waiting) > STARTED_AT_ONCE:
            start(self._start_others(start, waiting[STARTED_AT_ONCE:]))

    async def _start_others(self, start: Start, waiting: list[_Running]) -> None:
        for number, each in enumerate(waiting):
            if number % STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)
            if each.task is None and not each.is_ending and self._running.get(each.issuing.workload.name) is each:
                each.task = start(each.issuer.run())

    def start_outputs(self, start: Start, written: Mapping[str, Written]) -> None:
        """Start the outputs that do not run yet. Those that are another in `written` have been stopped."""
        for name, each in self._running.items():
            wanted = written.get(name)
            if each.output is not None and each.output.written == wanted:
                continue
            each.output = None if wanted is None else self._output(start, wanted)

    def _output(self, start: Start, written: Written) -> _Output:
        from sds_agent.outputs.hooks import HookCommands, Hooks  # noqa: PLC0415 - measured: 10 ms
        from sds_agent.outputs.layout import LAYOUTS, OutputContents  # noqa: PLC0415 - measured: as above
        from sds_agent.outputs.writer import Output, write_changes  # noqa: PLC0415 - measured: as above

        output = written.output
        hooks = Hooks(
            HookCommands(written.name, str(output.directory), output.on_renewed, output.on_failed, output.hook_timeout)
        )
        target = Output(
            output.directory,
            OutputContents(written.name, written.bundles),
            LAYOUTS[output.layout],
            output.owner,
            output.group,
            int(output.key_mode, 8),
            hooks,
        )
        tasks = [start(write_changes(target, self._target.store, self._clock)), start(hooks.run())]
        return _Output(written, tasks, hooks.attempted)


def import_outputs() -> None:
    """Import what writes outputs, where that has not been done. It takes 10 ms, and raises what an import may raise."""
    from sds_agent.outputs import hooks, layout, writer  # noqa: F401, PLC0415 - measured, see `_output`
