"""An Envoy that refuses some of what it is sent, in any order of events: what is good reaches every listener of it.

The model of the Envoy does what runs of real ones have shown (`sds.refusals`). It has a stream for each secret, and its
messages and ours cross. Whatever happens in between, once all is answered each listener uses the newest of each of its
secrets that is good, and never one that is bad.
"""

import itertools
from collections import deque
from collections.abc import Iterator

from fakes.served import Served
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from sds_agent.sds.protocol import Acked, Action, Nacked, Resource, Respond, SotwRequest
from sds_agent.sds.refusals import MOST_SENT, Refusals, Replacements
from sds_agent.sds.sotw import SotwSession

NAMES = ("a", "b", "roots")
LISTENERS = {"one": ("a", "roots"), "two": ("b", "roots"), "three": ("b", "roots")}
BAD = "bad"
MOST_ANSWERS = len(NAMES) * (1 + MOST_SENT) ** 2
"""For each change: to each name, what takes it back, and each time that it is sent anew."""
names = st.sampled_from(NAMES)


class Envoy:
    """A stand-in for an Envoy: what it was sent last of each name, and what its listeners know and use."""

    def __init__(self) -> None:
        self.last: dict[str, Resource] = {}
        self.known: dict[str, dict[str, Resource]] = {each: {} for each in LISTENERS}
        self.used: dict[str, dict[str, str]] = {each: {} for each in LISTENERS}

    def take(self, sent: Resource) -> str | None:
        """Returns why it refuses this."""
        if self.last.get(sent.name) == sent:
            return None  # which reaches no listener
        self.last[sent.name] = sent
        for listener, needed in LISTENERS.items():
            if sent.name not in needed:
                continue
            known = self.known[listener]
            known[sent.name] = sent
            if known.keys() < set(needed):
                continue  # it looks at them once it has all
            for each in known.values():
                if each.version.endswith(BAD):
                    return f"{each.name} is bad"
            self.used[listener] = {name: each.version for name, each in known.items()}
        return None


class Channel:
    """A stream: the session at our end, and what is on the way to either."""

    def __init__(self, name: str, machine: "Refusing") -> None:
        self.name = name
        self._time = machine.time
        self.to_envoy: deque[Respond] = deque()
        self.to_us: deque[SotwRequest] = deque()
        self._session = SotwSession(self._numbers())
        self._seen = Replacements(machine.served)
        self._served = machine.served
        self._former = machine.former
        self._refusals = machine.refusals
        self._due = ""
        self._changed: set[str] = set()  # nonces of answers with a secret that had changed
        self._sent_at: dict[str, int] = {}
        self._do(self._session.receive(SotwRequest(names=(name,)), self._seen))

    def change(self, version: str) -> None:
        """The secret has changed to that version."""
        self._seen.drop(self.name)
        self._refusals.changing(self, self.name, version)
        self._due = version
        self.refresh()

    def refresh(self) -> None:
        """Send what is due."""
        self._do(self._session.refresh(self._seen))

    def hear(self) -> None:
        """A reply has come."""
        actions = self._session.receive(self.to_us.popleft(), self._seen)
        for each in actions:
            if isinstance(each, Acked | Nacked):
                changed, sent_at = each.nonce in self._changed, self._sent_at[each.nonce]
                self._refusals.replied(self, each, changed=changed, sent_at=sent_at, now=next(self._time))
        self._do(actions)
        self.refresh()

    def take_back(self, name: str, version: str, count: int) -> str | None:
        """Send what was acknowledged before."""
        former = self._former.get((name, self._session.version_in_use(name)))
        if former is None or self._current(version) is None:
            return None
        self._session.resend(name)
        self._seen.put(version, Resource(name, former.version, sotw=b"\n" * count))
        self.refresh()
        return former.version

    def send_anew(self, name: str, version: str, count: int) -> bool:
        """Send it with other bytes."""
        if self._current(version) is None:
            return False
        self._session.resend(name)
        self._seen.put(version, Resource(name, version, sotw=b"\n" * count))
        self.refresh()
        return True

    def _current(self, version: str) -> Resource | None:
        found = self._served[self.name]
        return found if isinstance(found, Resource) and found.version == version else None

    def _numbers(self) -> Iterator[str]:
        return (f"{self.name}{number}" for number in itertools.count(1))

    def _do(self, actions: list[Action]) -> None:
        for each in actions:
            if isinstance(each, Respond):
                self.to_envoy.append(each)
                self._sent_at[each.nonce] = next(self._time)
                if any(sent.version == self._due for sent in each.resources):
                    self._changed.add(each.nonce)
                    self._due = ""


class Refusing(RuleBasedStateMachine):
    """Secrets change, some to what Envoy refuses, and messages arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.envoy = Envoy()
        self.served = Served()
        self.former: dict[tuple[str, str], Resource] = {}
        self.refusals = Refusals()
        self.numbers = itertools.count(1)
        self.time = itertools.count(1)
        self.sent = 0
        self.changes = 0

    @initialize(bad=st.sets(names))
    def start(self, bad: set[str]) -> None:
        self.began_well = not bad
        for name in NAMES:
            self.put(name, bad=name in bad)
        self.channels = {name: Channel(name, self) for name in NAMES}
        self.settle()

    @rule(name=names, bad=st.booleans())
    def change(self, name: str, bad: bool) -> None:
        self.channels[name].change(self.put(name, bad=bad))

    @rule(name=names)
    def arrive(self, name: str) -> None:
        channel = self.channels[name]
        if channel.to_envoy:
            answer = channel.to_envoy.popleft()
            self.sent += 1
            assert self.sent <= MOST_ANSWERS * self.changes, "it is sent something for ever"
            reasons = [self.envoy.take(each) for each in answer.resources]
            error = next((each for each in reasons if each is not None), None)
            channel.to_us.append(SotwRequest(names=(name,), nonce=answer.nonce, error=error))

    @rule(name=names)
    def reply(self, name: str) -> None:
        channel = self.channels[name]
        if channel.to_us:
            channel.hear()

    @rule()
    def settle(self) -> None:
        while any(each.to_envoy or each.to_us for each in self.channels.values()):
            for name in NAMES:
                self.arrive(name)
                self.reply(name)
        newest = {each.name: each.version for each in self.served.values() if isinstance(each, Resource)}
        good = {name: version for name, version in newest.items() if not version.endswith(BAD)}
        for listener, used in self.envoy.used.items():
            assert not any(version.endswith(BAD) for version in used.values())
            if self.began_well or good == newest:  # else there was nothing good to go back to
                assert {name: used.get(name) for name in good if name in LISTENERS[listener]} == {
                    name: version for name, version in good.items() if name in LISTENERS[listener]
                }

    def put(self, name: str, *, bad: bool) -> str:
        version = f"{next(self.numbers)} {BAD if bad else 'good'}"
        self.former[name, version] = self.served.put(name, version)
        self.changes += 1
        return version

    def teardown(self) -> None:
        if hasattr(self, "channels"):
            self.settle()


TestRefusing = Refusing.TestCase
