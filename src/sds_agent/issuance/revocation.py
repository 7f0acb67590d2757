"""The revocation lists beside the trust bundle: what the authorities publish, and what of it is served and why not.

`lists` decides. Here is what it decides by: the newest answers, the lists chosen before, and the CAs that issued until
lately. Nothing of it is stored: after a restart the bundle has no lists until the authorities have been asked again.

Most configurations ask for no lists, so `lists` is imported where one does.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from msgspec import Struct, structs

from sds_agent import log
from sds_agent.pki.certificates import describe_time, unique
from sds_agent.pki.validation.choice import CaIdentity, ca_identity
from sds_agent.pki.validation.rules import Chain

if TYPE_CHECKING:
    from sds_agent.issuance.lists import Choice, PublishedList

LOG = logging.getLogger(__name__)

REMEMBERED = timedelta(minutes=1)
"""How long it is known which lists were served: longer than a leaf is held back for a bundle."""

_LAST = datetime.max.replace(tzinfo=UTC)


class _FormerCa(Struct, frozen=True):
    """A CA that issued here, since when it is not in use, and the longest `life` of its certificates: one that it
    issued for others may be valid for that long.
    """

    certificate: x509.Certificate
    since: datetime
    life: timedelta

    @property
    def until(self) -> datetime:
        """Until when that may be."""
        return self.since + self.life

    def at(self, now: datetime) -> "_FormerCa":
        """The same, where the clock was ahead for a while: it would count for as much longer."""
        return self if self.since <= now else structs.replace(self, since=now)


class _ServedFrom(Struct, frozen=True):
    """The CAs of the lists that were served from then on; None where there were no lists."""

    begin: datetime
    cas: frozenset[CaIdentity] | None


class Revocation:
    """The lists of the authorities that are `asked` for them by the configuration."""

    def __init__(self, asked: Iterable[str] = ()) -> None:
        self._asked = frozenset(asked)
        self._answered = set[str]()
        self._latest = dict[str, "tuple[PublishedList, ...]"]()
        self._advertised = dict[str, Chain]()
        self._former = dict[CaIdentity, _FormerCa]()
        self._choice: Choice | None = None
        self._kinds = frozenset[object]()
        self._served = list[_ServedFrom]()
        self._warned = frozenset[bytes]()
        self._lacking = asyncio.Event()
        self._off = log.LogOnChange(LOG, "revocation_off")

    @property
    def wanted(self) -> bool:
        """Whether lists are asked for at all."""
        return bool(self._asked)

    @property
    def check_at(self) -> datetime | None:
        """When the choice may become another one by itself."""
        ends = [each.until for each in self._former.values()]
        of_choice = [] if self._choice is None else [self._choice.check_at]
        return min([*ends, *filter(None, of_choice)], default=None)

    def ask(self, authorities: Iterable[str], gone: Iterable[str] = ()) -> None:
        """Lists are asked of these from now on. What others published counts no longer, nor what those did that are
        `gone`, though another has the name.
        """
        self._asked = frozenset(authorities)
        for name in (self._answered - self._asked).union(gone):
            self._answered.discard(name)
            self._latest.pop(name, None)
            self._advertised.pop(name, None)

    def update(self, authority: str, lists: "tuple[PublishedList, ...]", issuers: Chain = ()) -> None:
        """The authority publishes these lists now, by these CAs. Without an answer, what it published before counts."""
        self._answered.add(authority)
        self._latest[authority] = lists
        self._advertised[authority] = issuers

    def no_answer(self, authority: str) -> None:
        """The authority was asked and gave none."""
        self._answered.add(authority)

    def is_new(self, chain: Chain) -> bool:
        """Whether a chain that comes into use may change the choice: hundreds may be of one kind."""
        if not self.wanted:
            return False
        from sds_agent.issuance.lists import kind_of  # noqa: PLC0415 - see above

        return kind_of(chain) not in self._kinds

    def retire(self, chain: Chain, anchors: Chain, now: datetime) -> None:
        """A certificate is in use no longer: others by the same CA may be, for as long as it was valid."""
        if not self.wanted:
            return
        from sds_agent.issuance.lists import issuer_of  # noqa: PLC0415 - see above

        issuer = issuer_of(chain, anchors)
        if issuer is not None:
            life = chain[0].not_valid_after_utc - chain[0].not_valid_before_utc
            # one that never ends (RFC 5280 section 4.1.2.5) has lived for longer than there are years left
            former, identity = _FormerCa(issuer, now, min(life, _LAST - now)), ca_identity(issuer)
            known = self._former.get(identity)
            if known is None or known.at(now).until < former.until:  # else by a certificate that lived longer
                self._former[identity] = former

    def admits(self, chain: Chain, anchors: Chain, since: datetime) -> bool:
        """Whether every bundle that was served since then lets Envoys take the certificate, as far as lists go."""
        if not self._served:
            return True
        from sds_agent.issuance.lists import issuer_of  # noqa: PLC0415 - see above

        issuer = issuer_of(chain, anchors)
        if issuer is None:
            return True
        for each in reversed(self._served):
            if each.cas is not None and ca_identity(issuer) not in each.cas:
                return False
            if each.begin <= since:
                break
        return True

    def lists_beside(self, anchors: Chain, chains: Iterable[Chain], now: datetime) -> bytes:
        """The lists to serve with these anchors, in PEM; `chains` are in use. Logs why there are none.

        Before all authorities have been asked, and before there is a certificate, none are expected. Those that are
        served stay while one that is new has not answered yet, as long as none of its own is needed.
        """
        if self._choice is None and not self.wanted:
            return b""
        from sds_agent.issuance.lists import Choice, KnownCas, choose, kind_of  # noqa: PLC0415 - see above

        before = Choice({}) if self._choice is None else self._choice
        former_cas = {key: each.at(now) for key, each in self._former.items()}
        self._former = {key: each for key, each in former_cas.items() if now < each.until}
        longest_last = sorted(chains, key=lambda chain: chain[0].not_valid_after_utc) if self.wanted else []
        in_use = {kind_of(chain): chain for chain in longest_last}
        self._kinds = frozenset(in_use)
        is_expected = self._asked <= self._answered
        if not self.wanted or not in_use or not (is_expected or before.lists):
            return self._without(before, now)
        former = tuple(each.certificate for each in self._former.values())
        advertised = unique(ca for cas in self._advertised.values() for ca in cas)
        latest = tuple(each for lists in self._latest.values() for each in lists)
        known = KnownCas(anchors, tuple(in_use.values()), former, advertised)
        choice = choose(latest, before.usable, known, now)
        if choice.off and not is_expected:
            return self._without(before, now)
        self._choice = choice
        self._report(choice, before, now)
        return choice.pem

    def _without(self, before: "Choice", now: datetime) -> bytes:
        """No list, for no reason that is worth a word."""
        self._choice = structs.replace(before, lists={}, off=(), left_out=(), check_at=None)
        self._note(None, now)
        return b""

    async def lacking(self) -> None:
        """Return when lists have come to be lacking since this returned last: it is worth asking for them now."""
        await self._lacking.wait()
        self._lacking.clear()

    def _report(self, choice: "Choice", before: "Choice", now: datetime) -> None:
        if choice.left_out and choice.left_out != before.left_out:
            log.event(LOG, "lists_left_out", level=logging.WARNING, causes=choice.left_out)
        if choice.off and choice.off != before.off:
            self._lacking.set()
        self._off.report(choice.off)
        self._note(frozenset(choice.lists) or None, now)
        self._warn_of_ends(choice, now)

    def _note(self, cas: frozenset[CaIdentity] | None, now: datetime) -> None:
        """The bundle has the lists of these CAs from now on."""
        if cas == (self._served[-1].cas if self._served else None):
            return
        late = [each for each, after in itertools.pairwise(self._served) if after.begin > now - REMEMBERED]
        self._served = [*late, *self._served[-1:], _ServedFrom(now, cas)]
        if cas is not None:
            log.event(LOG, "revocation_on", lists=len(cas))

    def _warn_of_ends(self, choice: "Choice", now: datetime) -> None:
        """Warn once of each list that should have been replaced by now."""
        late = [each for each in choice.usable if each.warned_at is not None and now >= each.warned_at]
        for each in late:
            if each.pem in self._warned:
                continue
            end = each.crl.next_update_utc or now
            cause = (
                f"{each.name} ends on {describe_time(end)} and was not replaced; have its CA publish another one, or "
                "revocation is off from then on"
            )
            log.event(LOG, "list_ends_soon", level=logging.WARNING, cause=cause, not_after=end)
        self._warned = frozenset(each.pem for each in late)
