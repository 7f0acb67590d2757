"""The token that the agent shows to Vault: where it comes from, and how long it stays in use.

A login costs one request, so a token is thrown away easily: when its lease has ended, when the server knows it no more,
or when the client certificate has changed that it belongs to. But not every token can be had again. A secret ID may be
good for one login, and a token in a file has none. So a task renews each token that can be renewed at two thirds of its
lease, also when no certificate is due.
"""

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from msgspec import structs

from sds_agent import log
from sds_agent.authority.credentials import Token, read_token
from sds_agent.authority.operator_files import OperatorFiles
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.authority.vault.lease import HeldToken, TokenLease
from sds_agent.authority.vault.nodes import VaultNodes, VaultReach
from sds_agent.authority.vault.proofs import certificate_mark, read_login_call
from sds_agent.authority.vault.refusals import TokenRefusedError, not_logged_in, not_renewed
from sds_agent.authority.vault.settings import VaultSettings, VaultTokenAuth
from sds_agent.authority.vault.wire import LOOK_UP, RENEW, VaultCall, read_login, read_looked_up
from sds_agent.clock import LONGEST_SLEEP, Clock
from sds_agent.tasks import NoThreadError, SharedCall, background_tasks

LOG = logging.getLogger(__name__)

RENEWAL_TIMEOUT = 10.0
"""Seconds that a renewal may take, as a request of a certificate may by default."""
RETRY = 10.0
"""Seconds until the server is asked again how long a token lasts."""
FILE_EVERY = 30.0
"""Seconds between two readings of the file with the token that no request makes."""
_FILE = "the file that auth names"
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


class VaultSession:
    """Gives the token to show. Only one login runs at a time, whatever number of workloads ask."""

    def __init__(self, name: str, settings: VaultSettings, nodes: VaultNodes, clock: Clock) -> None:
        self._name = name
        self._settings = settings
        self._nodes = nodes
        self._clock = clock
        self._held: HeldToken | None = None
        self._changed = asyncio.Event()
        self._login = SharedCall[HeldToken]()
        self._operator = OperatorFiles()
        self._failing = log.LogOnChange(LOG, "token_not_renewed")

    async def token(self, reach: VaultReach, unknown: Token | None = None) -> Token:
        """The token in the file, or the one of the last login, or else that of a new one. Raises AuthorityError.

        A new one takes the place of a token that is `unknown` to the server, which stays in use where the login fails:
        a secret ID may be spent, and something before the server may have refused a token that is good.
        """
        auth = self._settings.auth
        if isinstance(auth, VaultTokenAuth):
            return self._read(await self._operator.read(_FILE, read_token, auth.token_file))
        login = certificate_mark(auth, reach.certificate)
        held = self._held
        if held is None or held.token == unknown or not held.is_good(self._passed(), login):
            # it goes on when its callers leave: it may have spent the secret ID, and the next one takes the token
            held = await self._login.result(lambda: self._log_in(reach, login))
        return held.token

    async def keep(self) -> None:
        """Renew the token in use whenever that is due, until cancelled, which also ends a login under way."""
        auth = self._settings.auth
        try:
            async with background_tasks() as start:
                if isinstance(auth, VaultTokenAuth):
                    start(self._follow(auth.token_file))
                await self._renew()
        finally:
            await self._login.end()

    async def _follow(self, file: Path) -> None:
        """Take each token that comes into the file into use, until cancelled.

        A request reads the file too, but after a restart with stored certificates the first one may come when the token
        has ended, and so may the next one after the file was replaced.
        """
        while True:
            with suppress(AuthorityError, NoThreadError):  # the next request says what is wrong with the file
                self._read(await self._operator.read(_FILE, read_token, file))
            await self._clock.sleep(FILE_EVERY)

    async def _renew(self) -> None:
        while True:
            self._changed.clear()
            async with background_tasks() as start:
                if self._held is not None:
                    start(self._renew_when_due(self._held))
                await self._changed.wait()

    def _hold(self, held: HeldToken) -> None:
        self._held = held
        self._changed.set()

    def _read(self, token: Token) -> Token:
        """Take the token in the file into use, if it is another one than before."""
        if self._held is None or self._held.token.text != token.text:
            self._hold(HeldToken(token))
        return token

    async def _log_in(self, reach: VaultReach, login: str) -> HeldToken:
        call = await self._operator.read(_FILE, read_login_call, self._settings.auth)
        answer = await self._nodes.log_in(call, reach)
        if answer.http.status != 200:
            raise not_logged_in(self._nodes.refusal(answer, call), self._settings)
        token, lease = read_login(answer.http.body, self._passed())
        held = HeldToken(token, lease, login)
        self._hold(held)
        self._failing.resolved()
        log.event(LOG, "logged_in", authority=self._name, renewable=lease.renewable, until=self._until(lease))
        return held

    async def _renew_when_due(self, held: HeldToken) -> None:
        """Renew this token until it can be renewed no more."""
        lease = held.lease or await self._looked_up(held)
        while lease is not None:
            self._note(held, lease)
            if lease.renew_at is None:
                return
            while (left := (lease.renew_at - self._passed()).total_seconds()) > 0:
                await self._clock.sleep(min(left, LONGEST_SLEEP))  # which stands still while the machine is suspended
            lease = await self._renewed(held, lease)

    def _note(self, held: HeldToken, lease: TokenLease) -> None:
        if self._held is not None and self._held.token.text == held.token.text:
            self._held = structs.replace(self._held, lease=lease)

    async def _looked_up(self, held: HeldToken) -> TokenLease | None:
        """How long a token lasts that the agent did not log in for; None where the server does not say so."""
        while True:
            try:
                body = await self._ask(VaultCall(LOOK_UP, token=held.token, post=False), await self._nodes.reach())
                lease = read_looked_up(body, self._passed())
            except TokenRefusedError as error:
                self._report(error)
                return None
            except (AuthorityError, NoThreadError) as error:
                self._report(error)
                await self._clock.sleep(RETRY)
            else:
                self._failing.resolved()
                self._debug("token_looked_up", lease)
                return lease

    async def _renewed(self, held: HeldToken, lease: TokenLease) -> TokenLease:
        """The lease after a renewal, or after an attempt at one."""
        try:
            reach = await self._nodes.reach()
            if certificate_mark(self._settings.auth, reach.certificate) != held.login:
                return lease.final()  # only the certificate of the login renews it: the next request logs in
            body = await self._ask(VaultCall(RENEW, b"{}", held.token), reach)
            renewed = read_login(body, self._passed())[1]
        except TokenRefusedError as error:
            self._report(error)
            return lease.final()
        except (AuthorityError, NoThreadError) as error:
            self._report(error)
            return lease.after_failure(self._passed())
        self._failing.resolved()
        lease = lease.followed_by(renewed)
        self._debug("token_renewed", lease)
        return lease

    async def _ask(self, call: VaultCall, reach: VaultReach) -> bytes:
        """Ask about the token. Raises TokenRefusedError where asking again is of no use, and AuthorityError."""
        try:
            async with asyncio.timeout(RENEWAL_TIMEOUT):
                answer = await self._nodes.ask(call, reach)
        except TimeoutError as error:
            message = (
                f"Vault at {' and '.join(self._settings.url)} did not answer within {RENEWAL_TIMEOUT:.0f} s; check "
                "that the network lets the agent through"
            )
            raise AuthorityError(ErrorKind.TRANSIENT, message) from error
        if answer.http.status != 200:
            raise not_renewed(self._nodes.refusal(answer, call), self._settings)
        return answer.http.body

    def _debug(self, name: str, lease: TokenLease) -> None:
        until, renewable = self._until(lease), lease.renewable
        log.event(LOG, name, level=logging.DEBUG, authority=self._name, renewable=renewable, until=until)

    def _passed(self) -> datetime:
        """The time by a clock that nobody sets, for leases."""
        return _BEGINNING + timedelta(seconds=self._clock.passed())

    def _until(self, lease: TokenLease) -> datetime | str:
        """When the lease ends, by the wall clock."""
        return "no end" if lease.ends is None else self._clock.now() + (lease.ends - self._passed())

    def _report(self, error: AuthorityError | NoThreadError) -> None:
        self._failing.report(str(error), authority=self._name)
