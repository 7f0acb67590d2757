"""What is sent to an Envoy that has refused a secret: what makes it take the others, and no more than that."""

from fakes.compared import Name
from fakes.served import Served

from sds_agent.sds.protocol import Absence, Acked, Nacked, Resource
from sds_agent.sds.refusals import MOST_REFUSALS, MOST_SENT, Refusals, Replacements
from sds_agent.sds.status import Nack, NameStatus

BACK, ANEW = "back", "anew"


class Stream:
    """A stand-in for a stream, which remembers what it is told to send. Without `former` there is nothing before."""

    def __init__(self, name: str, *, former: bool = True) -> None:
        self.name = name
        self.former = former
        self.current = True
        self.sent: list[tuple[str, str, int]] = []

    def take_back(self, name: str, version: str, count: int) -> str | None:
        """Remember it."""
        assert name == self.name
        if not (self.former and self.current):
            return None
        self.sent.append((BACK, version, count))
        return "before"

    def send_anew(self, name: str, version: str, count: int) -> bool:
        """Remember it."""
        assert name == self.name
        if self.current:
            self.sent.append((ANEW, version, count))
        return self.current


class Envoy:
    """The replies of an Envoy with a stream for each secret."""

    def __init__(self, *streams: Stream) -> None:
        self.refusals = Refusals()
        self.streams = streams
        self._time = 1.0

    def refuses(self, stream: Stream, version: str, *, after: float = 0.5) -> None:
        """It refuses this version, so many steps after it was sent."""
        self._replies(stream, Nacked("n", {stream.name: version}, "why"), changed=True, after=after)

    def takes(self, stream: Stream, version: str, *, changed: bool = True) -> None:
        """It takes this version, which went out because the secret changed; not so what it had before."""
        changed = changed and version != "before"
        self._replies(stream, Acked("n", {stream.name: version}), changed=changed, after=0.5)

    def _replies(self, stream: Stream, reply: Acked | Nacked, *, changed: bool, after: float) -> None:
        self._time += 1
        self.refusals.replied(stream, reply, changed=changed, sent_at=self._time - after, now=self._time)

    @property
    def sent(self) -> list[list[tuple[str, str, int]]]:
        """What was sent on each stream since this was last asked for."""
        found = [each.sent for each in self.streams]
        for each in self.streams:
            each.sent = []
        return found


def test_what_is_refused_is_taken_back_and_stays_so() -> None:
    """Envoy refuses the next roots for the sake of a bad certificate until it has a good one again."""
    leaf, roots = Stream("leaf"), Stream("roots")
    envoy = Envoy(leaf, roots)
    envoy.refuses(leaf, "2")
    assert envoy.sent == [[(BACK, "2", 0)], []]
    envoy.takes(leaf, "before")
    envoy.takes(roots, "2")
    assert envoy.sent == [[], []], "the bad one would be refused again"


def test_what_is_refused_beside_another_is_sent_anew_and_alone_once_all_is_taken_back() -> None:
    leaf, roots = Stream("leaf"), Stream("roots")
    envoy = Envoy(leaf, roots)
    envoy.refuses(leaf, "2")
    envoy.refuses(roots, "2")
    assert envoy.sent == [[(BACK, "2", 0)], []]
    envoy.takes(leaf, "before")
    assert envoy.sent == [[], [(BACK, "2", 0)]]
    envoy.takes(roots, "before")
    assert envoy.sent == [[(ANEW, "2", 1)], []]
    envoy.refuses(leaf, "2")
    assert envoy.sent == [[(BACK, "2", 0)], []]
    envoy.takes(leaf, "before")
    assert envoy.sent == [[], [(ANEW, "2", 1)]]
    envoy.takes(roots, "2")
    assert envoy.sent == [[], []]


def test_what_cannot_be_taken_back_yet_is_taken_back_in_its_turn_with_other_bytes() -> None:
    """The same bytes once more would reach no listener."""
    leaf, roots = Stream("leaf"), Stream("roots")
    envoy = Envoy(leaf, roots)
    envoy.refuses(roots, "2")
    envoy.refuses(leaf, "2")
    assert envoy.sent == [[], [(BACK, "2", 0)]]
    envoy.refuses(roots, "before")
    assert envoy.sent == [[(BACK, "2", 0)], []]
    envoy.takes(leaf, "before")
    assert envoy.sent == [[], [(BACK, "2", 1)]]


def test_a_version_is_not_sent_for_ever() -> None:
    """Whatever the client is, it refuses everything."""
    leaf, roots = Stream("leaf"), Stream("roots")
    envoy = Envoy(leaf, roots)
    for version in ("2", "3"):
        envoy.refuses(leaf, version)
        envoy.refuses(roots, version)
        sent = list[list[tuple[str, str, int]]]()
        while any(now := envoy.sent):
            sent.append(now[0] + now[1])
            for stream, news in zip((leaf, roots), now, strict=True):
                for what, *_ in news:
                    envoy.refuses(stream, "before" if what == BACK else version)
        assert 2 * MOST_SENT <= len(sent) <= 4 * MOST_SENT


class Whatever:
    """A stand-in for a stream that can send nothing."""

    def take_back(self, _name: str, _version: str, _count: int) -> str | None:
        """Not that either."""
        return None

    def send_anew(self, _name: str, _version: str, _count: int) -> bool:
        """Nor that."""
        return False


def test_the_refusals_of_a_connection_are_bounded() -> None:
    """Each reply costs a look at all of them, and a client may refuse a hundred names on each of its streams."""
    refusals = Refusals()
    versions = {str(number): "1" for number in range(2 * MOST_REFUSALS)}
    refusals.replied(Whatever(), Nacked("n", versions, "why"), changed=True, sent_at=1.0, now=2.0)
    assert len(refusals._open) == MOST_REFUSALS


def test_first_secrets_are_sent_anew_when_another_one_has_changed() -> None:
    """As an Envoy starts it takes a bad certificate, and refuses the roots for its sake."""
    leaf, roots = Stream("leaf"), Stream("roots", former=False)
    envoy = Envoy(leaf, roots)
    envoy.takes(leaf, "1", changed=False)
    envoy.refuses(roots, "1")
    envoy.takes(leaf, "1", changed=False)
    assert envoy.sent == [[], []], "nothing has changed"
    for change in range(2 * MOST_SENT):
        envoy.takes(leaf, str(change + 2))
        assert envoy.sent == [[], [(ANEW, "1", change % MOST_SENT + 1)]], "with other bytes than before"
        envoy.refuses(roots, "1")
        assert envoy.sent == [[], []], "until the next change"
    envoy.refuses(roots, "2")
    envoy.takes(leaf, "after the change")
    assert envoy.sent == [[], [(ANEW, "2", 1)]]


def test_what_was_refused_too_often_is_sent_anew_when_the_cause_is_mended() -> None:
    """As an Envoy starts it takes a bad certificate, and refuses the roots, and all that follows until a good one."""
    leaf, roots = Stream("leaf"), Stream("roots", former=False)
    envoy = Envoy(leaf, roots)
    envoy.refuses(roots, "1")
    envoy.refuses(leaf, "2")
    while any(now := envoy.sent):
        for stream, news in zip((leaf, roots), now, strict=True):
            for what, version, _ in news:
                envoy.refuses(stream, "before" if what == BACK else version)
    envoy.refusals.changing(leaf, "leaf", "3")
    envoy.takes(leaf, "3")
    assert envoy.sent == [[], [(ANEW, "1", 1)]]


def test_a_change_that_is_taken_while_another_is_sent_anew_may_be_the_end_of_its_cause() -> None:
    """Replies on two streams may come in either order."""
    leaf, roots = Stream("leaf"), Stream("roots", former=False)
    envoy = Envoy(leaf, roots)
    envoy.refuses(roots, "1")
    envoy.takes(leaf, "2")
    assert envoy.sent == [[], [(ANEW, "1", 1)]]
    envoy.takes(leaf, "3")
    assert envoy.sent == [[], []], "the reply is awaited"
    envoy.refuses(roots, "1")
    assert envoy.sent == [[], [(ANEW, "1", 2)]]
    envoy.refuses(roots, "1")
    assert envoy.sent == [[], []]


def test_a_refusal_that_comes_late_may_be_for_the_sake_of_what_is_mended_by_then() -> None:
    """Replies on two streams may come in either order, and another one was sent meanwhile."""
    leaf, roots = Stream("leaf"), Stream("roots")
    envoy = Envoy(leaf, roots)
    envoy.refuses(leaf, "2")
    envoy.takes(leaf, "before")
    envoy.refuses(roots, "2", after=1.5)
    assert envoy.sent == [[(BACK, "2", 0)], [(BACK, "2", 0)]]
    envoy.takes(roots, "before")
    assert envoy.sent == [[], [(ANEW, "2", 1)]]
    envoy.refuses(roots, "2")
    envoy.takes(roots, "before")
    assert envoy.sent == [[], [(BACK, "2", 0)]], "that was for its own sake"


def test_what_was_taken_back_does_not_count_as_a_change() -> None:
    """Or else two secrets that are always refused would cause each other to be sent, for ever."""
    leaf, roots = Stream("leaf"), Stream("roots", former=False)
    envoy = Envoy(leaf, roots)
    envoy.refuses(leaf, "2")
    envoy.takes(leaf, "before")
    envoy.refuses(roots, "1")
    assert envoy.sent == [[(BACK, "2", 0)], []]


def test_newer_content_on_its_way_is_waited_for() -> None:
    """It may be the end of the cause."""
    leaf, roots = Stream("leaf"), Stream("roots")
    envoy = Envoy(leaf, roots)
    envoy.refuses(leaf, "2")
    envoy.refuses(roots, "2")
    envoy.refusals.changing(leaf, "leaf", "3")
    envoy.takes(leaf, "before")
    assert envoy.sent == [[(BACK, "2", 0)], []], "that was sent before it"
    envoy.takes(leaf, "3")
    envoy.takes(roots, "before")
    assert envoy.sent == [[], [(BACK, "2", 0), (ANEW, "2", 1)]]


def test_a_secret_that_is_withheld_holds_up_no_other() -> None:
    leaf, roots = Stream("leaf"), Stream("roots")
    envoy = Envoy(leaf, roots)
    envoy.refuses(leaf, "2")
    envoy.refuses(roots, "2")
    assert envoy.sent == [[(BACK, "2", 0)], []], "the reply is awaited"
    envoy.refusals.changing(leaf, "leaf", None)
    assert envoy.sent == [[], [(BACK, "2", 0)]]


def test_a_secret_that_has_changed_meanwhile_is_left_alone() -> None:
    """The newer content is on its way."""
    leaf, roots = Stream("leaf"), Stream("roots")
    envoy = Envoy(leaf, roots)
    leaf.current = False
    envoy.refuses(leaf, "2")
    envoy.refuses(roots, "2")
    assert envoy.sent == [[], [(BACK, "2", 0)]]


def test_a_stream_that_ends_holds_up_no_other() -> None:
    leaf, roots = Stream("leaf"), Stream("roots")
    envoy = Envoy(leaf, roots)
    envoy.refuses(leaf, "2")
    envoy.refuses(roots, "2")
    assert envoy.sent == [[(BACK, "2", 0)], []], "the reply is awaited"
    envoy.refusals.keep(leaf, ())
    assert envoy.sent == [[], [(BACK, "2", 0)]]


def test_the_answer_that_a_name_is_not_served_cannot_be_taken_back() -> None:
    """Delta has a reply to that too."""
    gone = Stream("gone")
    envoy = Envoy(gone)
    envoy.refuses(gone, "")
    assert envoy.sent == [[]]


def test_a_stream_sees_the_replacement_until_the_secret_changes() -> None:
    served = Served(leaf=Resource("leaf", "2"))
    seen, former = Replacements(served), Resource("leaf", "1")
    assert seen["leaf"] == served["leaf"]
    seen.put("2", former, Nack("2", "why"))
    assert seen["leaf"] == former
    served.put("leaf", "3")
    assert seen["leaf"] == served["leaf"]


def test_a_secret_that_is_withheld_is_not_replaced() -> None:
    served = Served(leaf=Absence.PENDING)
    seen = Replacements(served)
    seen.put("2", Resource("leaf", "1"))
    assert seen["leaf"] == Absence.PENDING


def test_a_replacement_is_forgotten_with_its_key() -> None:
    """When the secret changes, and when the stream does not subscribe to it any more."""
    served = Served(leaf=Resource("leaf", "2"))
    seen = Replacements(served)
    seen.put("2", Resource("leaf", "1"))
    seen.drop("leaf")
    assert seen["leaf"] == served["leaf"]
    seen.put("2", Resource("leaf", "1"))
    seen.keep(["other"])
    assert seen["leaf"] == served["leaf"]


def test_what_was_taken_back_is_shown_as_refused() -> None:
    """The Envoy acknowledges what it had; an operator has to see that it does not have the newest."""
    nack = Nack("2", "why")
    seen = Replacements(Served())
    seen.put("2", Resource("leaf", "1"), nack)
    seen.put("2", Resource("roots", "2"))
    now = [NameStatus("leaf", "1", "1"), NameStatus("roots", "2", "2"), NameStatus("other", "5", "5")]
    assert seen.shown(["leaf", "roots", "other"], now) == (NameStatus("leaf", "1", "1", nack), *now[1:])
    of_the_former = NameStatus("leaf", "1", "1", Nack("1", "for the sake of another"))
    assert seen.shown(["leaf"], [of_the_former]) == (NameStatus("leaf", "1", "1", nack),)
    once_more = NameStatus("leaf", "2", "1", Nack("2", "another reason"))
    assert seen.shown(["leaf"], [once_more]) == (once_more,)


def test_a_replacement_that_goes_out_is_reported_once() -> None:
    seen, former = Replacements(Served()), Resource("leaf", "1")
    seen.put("2", former)
    assert seen.sent([Resource("leaf", "2")]) == []
    (found,) = seen.sent([former])
    assert (found.version, found.resource) == ("2", former)
    assert seen.sent([former]) == []


def test_a_list_of_thousands_of_names_is_gone_through_once_and_not_for_each_that_is_refused() -> None:
    """While it is, no other Envoy is served."""
    Name.compared = 0

    class Left(Stream):
        def take_back(self, _name: str, _version: str, _count: int) -> str | None:
            """Have nothing of before."""
            return None

        def send_anew(self, _name: str, _version: str, _count: int) -> bool:
            """Have nothing to send."""
            return False

    names = [f"name {number}" for number in range(MOST_REFUSALS)]
    refusals, instead, stream = Refusals(), Replacements(Served()), Left("leaf")
    refusals.replied(stream, Nacked("n", dict.fromkeys(names, "2"), "why"), changed=True, sent_at=0.0, now=1.0)
    for name in names:
        instead.put("2", Resource(name, "1"))
    kept = [Name(name) for name in reversed(names)]
    refusals.keep(stream, kept)
    instead.keep(kept)
    assert 0 < Name.compared <= 4 * len(names)
