"""Both sessions under any order of events, compared with a simple model of an Envoy that follows the rules.

The model knows which content a client has been sent on its stream and which it has taken in. Whatever happens in
between, once the client has answered everything it must hold the newest content of all it subscribed to that is there
to be had; and on the way there nothing is sent to it that it did not ask for, has been sent already, or could not
tell apart.
"""

import itertools
from collections.abc import Iterator

from fakes.served import Served
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sds_agent.sds.delta import REMOVED, DeltaSession
from sds_agent.sds.protocol import (
    Absence,
    Acked,
    Action,
    DeltaRequest,
    Finish,
    Nacked,
    Outstanding,
    Resource,
    Respond,
    SotwRequest,
    Stale,
)
from sds_agent.sds.sotw import SotwSession
from sds_agent.sds.status import NameStatus

NAMES = ("a", "b", "c")
some_names = st.lists(st.sampled_from((*NAMES, "nobody")), max_size=4)
reasons = st.none() | st.sampled_from(["", "no"])
strange = st.sampled_from(["old", "n0", "n999", "é" * 100])


class Exchange(RuleBasedStateMachine):
    """What both variants share: the secrets that change, the answers on their way, and what the client holds."""

    def __init__(self) -> None:
        super().__init__()
        self.served = Served()
        self.versions = itertools.count(1)
        self.nonces: list[str] = []
        self.on_the_way: list[Respond] = []
        self.sent: dict[str, str] = {}
        self.holds: dict[str, str] = {}
        self.ended = False
        self.wanted: set[str] = set()
        self.last: dict[str, str] = {}  # name -> version before it was taken away
        self.answers: dict[str, dict[str, str]] = {}  # nonce -> the versions in it
        self.acks: set[tuple[str, str]] = set()  # what the client has said of a name's version
        self.nacks: set[tuple[str, str]] = set()
        self.passed_over: set[tuple[str, str]] = set()  # what it has said nothing of, or too late to count

    def numbers(self) -> Iterator[str]:
        while True:
            self.nonces.append(f"n{len(self.nonces) + 1}")
            yield self.nonces[-1]

    def take(self, actions: list[Action], *, again: frozenset[str] = frozenset()) -> list[str]:
        """Take what goes to the client, and return the names in it. Only those in `again` may be sent unchanged."""
        answers = [action for action in actions if isinstance(action, Respond)]
        names: list[str] = []
        for answer in answers:
            assert not self.ended
            assert answer.resources or answer.removed, "an empty answer says nothing"
            contents = {r.name: r.version for r in answer.resources} | dict.fromkeys(answer.removed, REMOVED)
            assert len(contents) == len(answer.resources) + len(answer.removed), "a name twice in one answer"
            assert set(contents) <= self.wanted, "a name that was not asked for"
            for name, version in contents.items():
                found = self.served[name]
                newest = found.version if isinstance(found, Resource) else REMOVED
                assert found is not Absence.PENDING, "an answer about a secret that merely does not exist yet"
                assert version == newest, "not the newest content"
                assert name in again or self.sent.get(name) != version, "sent again though it has not changed"
            self.sent |= contents
            self.answers[answer.nonce] = contents
            names += contents
            self.on_the_way.append(answer)
        assert len(answers) <= 1, "one message or change leads to one answer"
        return names

    def deliver(self) -> str:
        answer = self.on_the_way.pop(0)
        self.holds |= {resource.name: resource.version for resource in answer.resources}
        self.holds |= dict.fromkeys(answer.removed, REMOVED)
        return answer.nonce

    def reply(self, nonce: str, error: str | None) -> None:
        """The client replies to an answer."""
        pairs = self.answers[nonce].items()
        (self.acks if error is None else self.nacks).update(pairs)

    def check(self, status: tuple[NameStatus, ...], *, settled: bool = False) -> None:
        """A status claims nothing that the client has not said, and once all is settled it says all."""
        for each in status:
            name = each.name
            assert each.acked is None or (name, each.acked) in self.acks
            assert each.nacked is None or (name, each.nacked.version) in self.nacks
            if settled and each.sent is not None and (name, each.sent) not in self.passed_over:
                nacked = each.nacked.version if each.nacked else None
                assert each.sent in {each.acked, nacked}, f"no reply about {name} was seen"
                assert nacked in {None, each.sent}, f"{name} was taken since"

    def forget(self) -> None:
        """The client drops what it no longer wants."""
        self.holds = {name: version for name, version in self.holds.items() if name in self.wanted}
        self.sent = {name: version for name, version in self.sent.items() if name in self.wanted}

    @initialize()
    def something_is_served(self) -> None:
        self.served.put("a", "v0")
        self.served.hold("b")

    @precondition(lambda self: not self.ended)
    @rule(name=st.sampled_from(NAMES))
    def change(self, name: str) -> None:
        self.served.put(name, f"v{next(self.versions)}")
        self.push()

    @precondition(lambda self: not self.ended)
    @rule(name=st.sampled_from(NAMES), gone=st.booleans())
    def take_away(self, name: str, *, gone: bool) -> None:
        found = self.served[name]
        if isinstance(found, Resource):
            self.last[name] = found.version
        if gone:
            self.served.pop(name, None)
        else:
            self.served.hold(name)
        self.push()

    @precondition(lambda self: not self.ended)
    @rule(name=st.sampled_from(NAMES))
    def bring_back(self, name: str) -> None:
        """What was taken away returns as it was."""
        if name in self.last and not isinstance(self.served[name], Resource):
            self.served.put(name, self.last[name])
            self.push()

    @rule(name=st.sampled_from(NAMES))
    def change_unnoticed(self, name: str) -> None:
        """The stream is busy, and is refreshed later; its client's next message comes first."""
        self.served.put(name, f"v{next(self.versions)}")

    def push(self) -> None:
        raise NotImplementedError

    @invariant()
    def nonces_are_never_repeated(self) -> None:
        assert len(self.nonces) == len(set(self.nonces))

    def settled(self, *, removals: bool) -> None:
        """With nothing on the way, the client holds the newest of all it wants."""
        for name in self.wanted:
            found = self.served[name]
            if isinstance(found, Resource):
                assert self.holds.get(name) == found.version, f"{name} was never brought up to date"
            elif removals and found is Absence.UNKNOWN:
                assert self.holds.get(name) == REMOVED, f"the client was never sent the removal of {name}"


class SotwExchange(Exchange):
    """StreamSecrets. Like Envoy, the client sends the names it wants with the newest nonce that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.session = SotwSession(self.numbers())
        self.nonce = ""
        self.replied = set[str]()

    def reply(self, nonce: str, error: str | None) -> None:
        super().reply(nonce, error)
        self.replied.add(nonce)

    def all_unknown(self) -> bool:
        """Of the names that have reached the server: a message that crossed an answer has not."""
        names = self.session.names
        return bool(names) and all(self.served[name] is Absence.UNKNOWN for name in names)

    def send(self, nonce: str, error: str | None = None) -> None:
        newest = self.nonces[-1] if self.nonces else ""
        stale = bool(nonce) and self.answered and nonce != newest
        waiting, had = bool(self.on_the_way), set(self.session.names)
        is_first = self.answered and nonce in self.answers and nonce not in self.replied
        if nonce and nonce in self.answers:
            self.reply(nonce, error)
        actions = self.session.receive(SotwRequest(names=tuple(self.wanted), nonce=nonce, error=error), self.served)
        if stale:  # it crossed an answer; the client's reply to that one brings the names again
            reply = Outstanding(nonce, self.answers.get(nonce, {})).settled(error)
            assert actions == [reply if is_first else Stale(nonce, error)], "more than an ACK or NACK was acted on"
            return
        self.forget()
        self.notice()
        names = self.take(actions)
        if waiting:
            assert set(names) <= self.wanted - had, "with an answer outstanding only new names are answered"
        self.end(actions)

    def end(self, actions: list[Action]) -> None:
        finished = [action for action in actions if isinstance(action, Finish)]
        assert bool(finished) == self.all_unknown(), "a stream ends if nothing it asks for is served, and only then"
        self.ended = bool(finished)

    @property
    def answered(self) -> bool:
        return bool(self.nonce or self.on_the_way)

    @precondition(lambda self: not self.ended)
    @rule(names=some_names, empty=st.booleans())
    def subscribe(self, names: list[str], *, empty: bool) -> None:
        self.wanted = set(names)
        self.send("" if empty else self.nonce)

    @precondition(lambda self: self.answered and not self.ended)
    @rule(names=some_names, nonce=strange, error=reasons)
    def say_something_stale(self, names: list[str], nonce: str, error: str | None) -> None:
        before = self.session.names
        actions = self.session.receive(SotwRequest(names=tuple(names), nonce=nonce, error=error), self.served)
        assert actions == [Stale(nonce, error)]
        assert self.session.names == before

    @rule(names=some_names, old_nonce=st.booleans(), error=reasons)
    def reconnect(self, names: list[str], *, old_nonce: bool, error: str | None) -> None:
        self.session = SotwSession(self.numbers())
        self.on_the_way, self.holds, self.sent, self.ended = [], {}, {}, False
        self.wanted = set(names)
        old, self.nonce = self.nonce, ""
        self.send(old if old_nonce else "", error)

    @precondition(lambda self: self.on_the_way and not self.ended)
    @rule(error=reasons)
    def answer(self, error: str | None) -> None:
        self.nonce = self.deliver()
        self.send(self.nonce, error)

    def notice(self) -> None:
        """What the session sees withdrawn it may send again when it returns."""
        for name in self.wanted:
            if self.served[name] is Absence.UNKNOWN:
                self.sent.pop(name, None)

    def push(self) -> None:
        self.notice()
        outstanding = bool(self.on_the_way)
        actions = self.session.refresh(self.served)
        assert not (self.take(actions) and outstanding), "a push did not wait for the ACK"
        self.end(actions)

    @precondition(lambda self: not self.ended)
    @rule()
    def refresh_again(self) -> None:
        self.push()

    @invariant()
    def up_to_date(self) -> None:
        self.check(self.session.status)
        if not self.ended and not self.on_the_way:
            assert set(self.session.names) == self.wanted

    def teardown(self) -> None:
        """However long it took, it ends well: the stream is refreshed and the client answers what comes."""
        if self.ended:
            return
        self.push()
        if self.all_unknown():
            return
        for _ in range(len(self.on_the_way) + 1):  # what is under way, and the changes that waited for its end
            if not self.on_the_way:
                break
            self.nonce = self.deliver()
            self.send(self.nonce)
        assert not self.on_the_way
        self.settled(removals=False)
        self.check(self.session.status, settled=True)


class DeltaExchange(Exchange):
    """DeltaSecrets. Subscription changes count whatever their nonce."""

    def __init__(self) -> None:
        super().__init__()
        self.session = DeltaSession(self.numbers())

    def say(self, request: DeltaRequest) -> list[Action]:
        waiting = len(self.on_the_way)
        again = frozenset(request.subscribe)
        self.wanted = (self.wanted - set(request.unsubscribe)) | again
        self.forget()
        for name in again:  # a client that subscribes again has lost it
            self.sent.pop(name, None)
            self.holds.pop(name, None)
        actions = self.session.receive(request, self.served)
        assert not [action for action in actions if isinstance(action, Finish)]
        names = self.take(actions, again=again)
        assert {n for n in again if self.served[n] is not Absence.PENDING} <= set(names), "met with silence"
        if waiting:
            assert set(names) <= again, "with an answer outstanding only what is asked for is answered"
        return actions

    @rule(names=some_names, dropped=some_names, nonce=st.just("") | strange)
    def subscribe(self, names: list[str], dropped: list[str], nonce: str) -> None:
        self.say(DeltaRequest(tuple(names), tuple(dropped), nonce))

    @rule(names=some_names)
    def reconnect(self, names: list[str]) -> None:
        self.session = DeltaSession(self.numbers())
        self.on_the_way, self.holds, self.sent, self.wanted = [], {}, {}, set()
        self.say(DeltaRequest(tuple(names)))

    @precondition(lambda self: self.on_the_way)
    @rule(error=reasons, names=some_names, skipped=st.integers(0, 2))
    def answer(self, error: str | None, names: list[str], skipped: int) -> None:
        """Answer one of the answers on the way, and so those before it."""
        for _ in range(min(skipped, len(self.on_the_way) - 1)):
            self.passed_over |= set(self.answers[self.deliver()].items())
        nonce = self.deliver()
        self.reply(nonce, error)
        actions = self.say(DeltaRequest(tuple(names), nonce=nonce, error=error))
        assert [type(action) for action in actions[:1]] == [Acked if error is None else Nacked]

    def push(self) -> None:
        outstanding = bool(self.on_the_way)
        actions = self.session.refresh(self.served)
        assert not [action for action in actions if isinstance(action, Finish)]
        assert not (self.take(actions) and outstanding), "a push did not wait for the ACK"

    @rule()
    def refresh_again(self) -> None:
        self.push()

    @invariant()
    def names_are_those_asked_for(self) -> None:
        self.check(self.session.status)
        assert set(self.session.names) == self.wanted

    def teardown(self) -> None:
        """However long it took, it ends well."""
        self.push()
        for _ in range(50):
            if not self.on_the_way:
                break
            nonce = self.deliver()
            self.reply(nonce, None)
            self.say(DeltaRequest(nonce=nonce))
        assert not self.on_the_way
        self.settled(removals=True)
        self.check(self.session.status, settled=True)


TestSotwExchange = SotwExchange.TestCase
TestSotwExchange.settings = settings(max_examples=150, stateful_step_count=40)
TestDeltaExchange = DeltaExchange.TestCase
TestDeltaExchange.settings = settings(max_examples=150, stateful_step_count=40)
