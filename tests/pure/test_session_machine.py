"""Both sessions under any order of events, held against a simple model of an Envoy that keeps the rules.

The model knows one thing: which content a client has been given on its stream. Whatever happens in between, once the
client has answered everything it must hold the newest content of all it subscribed to that is there to be had.
"""

import itertools
from collections.abc import Iterator

from fakes.served import Served
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sds_agent.sds.delta import DeltaSession
from sds_agent.sds.protocol import Action, DeltaRequest, Finish, Request, Resource, Respond
from sds_agent.sds.sotw import SotwSession

NAMES = ("a", "b", "c")
some_names = st.lists(st.sampled_from((*NAMES, "nobody")), max_size=4)
reasons = st.none() | st.sampled_from(["", "no"])
wild = st.sampled_from(["", "n0", "n1", "n2", "old"])


class Exchange(RuleBasedStateMachine):
    """What both variants share: the secrets that change, the answers on their way, and what the client holds."""

    @property
    def subscription(self) -> tuple[str, ...]:
        """The names that the session believes to be wanted."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.served = Served()
        self.versions = itertools.count(1)
        self.nonces: list[str] = []
        self.on_the_way: list[Respond] = []
        self.holds: dict[str, str] = {}
        self.ended = False
        self.wanted: set[str] = set()

    def numbers(self) -> Iterator[str]:
        while True:
            self.nonces.append(f"n{len(self.nonces) + 1}")
            yield self.nonces[-1]

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Respond):
                assert not self.ended
                assert action.resources or action.removed, "an empty answer says nothing"
                assert {r.name for r in action.resources} <= set(self.subscription), "a name that was not asked for"
                self.on_the_way.append(action)
            if isinstance(action, Finish):
                self.ended = True

    def deliver(self) -> str:
        answer = self.on_the_way.pop(0)
        self.holds |= {resource.name: resource.version for resource in answer.resources}
        return answer.nonce

    @initialize()
    def something_is_served(self) -> None:
        self.served.put("a", "v0")
        self.served.hold("b")

    @invariant()
    def nonces_are_never_repeated(self) -> None:
        assert len(self.nonces) == len(set(self.nonces))

    def settled(self) -> None:
        """With nothing on the way, the client holds the newest of all it wants."""
        for name in self.wanted:
            resource = self.served[name]
            if isinstance(resource, Resource):
                assert self.holds.get(name) == resource.version, f"{name} was never brought up to date"


class SotwExchange(Exchange):
    """StreamSecrets. Like Envoy, the client sends the names it wants with the newest nonce that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.session = SotwSession(self.numbers())
        self.last = ""

    @property
    def subscription(self) -> tuple[str, ...]:
        return self.session.names

    def tell(self, nonce: str, error: str | None = None) -> None:
        newest = self.nonces[-1] if self.nonces else ""
        stale = bool(nonce) and self.answered and nonce != newest
        actions = self.session.receive(Request(names=tuple(self.wanted), nonce=nonce, error=error), self.served)
        if stale:  # it crossed an answer; the client's reply to that one brings the names again
            assert not [a for a in actions if isinstance(a, Respond | Finish)], "a stale message was acted on"
        else:
            self.holds = {name: version for name, version in self.holds.items() if name in self.wanted}
            self.take(actions)

    @property
    def answered(self) -> bool:
        return bool(self.last or self.on_the_way)

    @rule(names=some_names)
    def subscribe(self, names: list[str]) -> None:
        self.wanted = set(names)
        if not self.ended:
            self.tell(self.last)

    @precondition(lambda self: self.ended)
    @rule(old_nonce=st.booleans(), error=reasons)
    def reconnect(self, *, old_nonce: bool, error: str | None) -> None:
        self.session = SotwSession(self.numbers())
        self.on_the_way, self.holds, self.ended = [], {}, False
        old, self.last = self.last, ""
        self.tell(old if old_nonce else "", error)

    @precondition(lambda self: self.on_the_way and not self.ended)
    @rule(error=reasons)
    def answer(self, error: str | None) -> None:
        self.last = self.deliver()
        self.tell(self.last, error)

    @precondition(lambda self: not self.ended)
    @rule(name=st.sampled_from(NAMES))
    def change(self, name: str) -> None:
        self.served.put(name, f"v{next(self.versions)}")
        self.push()

    @precondition(lambda self: not self.ended)
    @rule(name=st.sampled_from(NAMES), gone=st.booleans())
    def take_away(self, name: str, *, gone: bool) -> None:
        if gone:
            self.served.pop(name, None)
        else:
            self.served.hold(name)
        self.push()

    def push(self) -> None:
        outstanding = len(self.on_the_way)
        self.take(self.session.refresh(self.served))
        assert not (outstanding and len(self.on_the_way) > outstanding), "a push did not wait for the ACK"

    @invariant()
    def up_to_date(self) -> None:
        if not self.on_the_way and not self.ended:
            assert set(self.session.names) == self.wanted
            self.settled()


class DeltaExchange(Exchange):
    """DeltaSecrets. Subscription changes count whatever their nonce."""

    def __init__(self) -> None:
        super().__init__()
        self.session = DeltaSession(self.numbers())

    @property
    def subscription(self) -> tuple[str, ...]:
        return self.session.names

    @rule(names=some_names, dropped=some_names, nonce=wild)
    def subscribe(self, names: list[str], dropped: list[str], nonce: str) -> None:
        if nonce in {answer.nonce for answer in self.on_the_way}:
            nonce = "stale"
        self.wanted = (self.wanted - set(dropped)) | set(names)
        request = DeltaRequest(subscribe=tuple(names), unsubscribe=tuple(dropped), nonce=nonce)
        actions = self.session.receive(request, self.served)
        given = {r.name for a in actions if isinstance(a, Respond) for r in a.resources}
        there = {name for name in names if isinstance(self.served[name], Resource)}
        assert there <= given, "a subscription was met with silence"
        assert not [a for a in actions if isinstance(a, Finish)]
        self.take(actions)

    @precondition(lambda self: self.on_the_way)
    @rule(error=reasons)
    def answer(self, error: str | None) -> None:
        nonce = self.deliver()
        self.take(self.session.receive(DeltaRequest(nonce=nonce, error=error), self.served))

    @rule(name=st.sampled_from(NAMES))
    def change(self, name: str) -> None:
        self.served.put(name, f"v{next(self.versions)}")
        outstanding = len(self.on_the_way)
        self.take(self.session.refresh(self.served))
        assert not (outstanding and len(self.on_the_way) > outstanding), "a push did not wait for the ACK"

    @rule(name=st.sampled_from(NAMES), gone=st.booleans())
    def take_away(self, name: str, *, gone: bool) -> None:
        if gone:
            self.served.pop(name, None)
        else:
            self.served.hold(name)
        self.take(self.session.refresh(self.served))

    @invariant()
    def nothing_that_exists_is_called_removed(self) -> None:
        for answer in self.on_the_way[-1:]:
            assert not {r.name for r in answer.resources} & set(answer.removed)

    @invariant()
    def up_to_date(self) -> None:
        if not self.on_the_way:
            self.settled()


TestSotwExchange = SotwExchange.TestCase
TestSotwExchange.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestDeltaExchange = DeltaExchange.TestCase
TestDeltaExchange.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
