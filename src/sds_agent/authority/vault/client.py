"""The client of Vault's PKI engine: one role signs, and the engine's issuers tell the trust domain's roots.

The roots are read before a certificate is asked for, so that a certificate never comes without what vouches for it.
While the CA is rotated the engine has several issuers, and only all of them together vouch for every certificate in
use. What an issuer's ID names never changes, so each certificate is read once.
"""

from datetime import timedelta

from sds_agent.authority.answers import Questions
from sds_agent.authority.credentials import Token
from sds_agent.authority.operator_files import OperatorFiles
from sds_agent.authority.protocol import AdvertisedLists, AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.authority.vault.nodes import NodeAnswer, VaultNodes, VaultReach
from sds_agent.authority.vault.refusals import fault_of, no_roots, not_listed, not_signed
from sds_agent.authority.vault.session import VaultSession
from sds_agent.authority.vault.settings import VaultSettings
from sds_agent.authority.vault.wire import (
    VaultCall,
    VaultSigned,
    crl_call,
    is_policys_denial,
    issuer_call,
    list_call,
    read_ids,
    read_issuer,
    read_signed,
    sign_call,
)
from sds_agent.pki.certificates import CertificateError, is_self_signed, read_bundle, write_beside

DELETED = 404
WITHOUT_KEY = 500
"""The answer where a list is asked of an issuer that has a certificate alone: it cannot sign one."""


class VaultAuthority:
    """Asks a role of Vault's PKI engine."""

    refresh_every: timedelta

    def __init__(self, settings: VaultSettings, nodes: VaultNodes, session: VaultSession) -> None:
        self.refresh_every = settings.refresh_every
        self.revocation_lists = settings.revocation_lists
        self._settings = settings
        self._nodes = nodes
        self._session = session
        self._issuers: dict[str, bytes] = {}
        self._ids: tuple[str, ...] = ()
        self._questions = Questions()  # for the IDs
        self._known: bytes = b""
        self._listing = set[str]()  # the issuers that have published a list
        self._operator = OperatorFiles()

    async def issue(self, request: IssueRequest) -> Issuance:
        """Ask the role once, after a login where one is due. Raises AuthorityError.

        Where the roots cannot be read, those that were read before stay in use, with a warning.
        """
        reach = await self._nodes.reach()
        warnings: tuple[str, ...] = ()
        try:
            await self._anchors(reach)
        except AuthorityError as error:
            if not self._known:
                raise
            warnings = (f"the roots that were read before stay in use: {error}",)
        signed = await self._signed(request, reach)
        if fault := fault_of(signed.chain, self._settings, str(request.identity)):
            raise fault
        if not warnings and self._is_new(signed.issuer):
            await self._anchors(reach)
        return Issuance(signed.chain, self._known, (*signed.warnings, *warnings))

    async def anchors(self) -> bytes:
        """The trust domain's roots: those in roots_file, or else the self-signed issuers. Raises AuthorityError."""
        return await self._anchors(await self._nodes.reach())

    async def lists(self) -> AdvertisedLists:
        """The list of each issuer that has a key. Raises AuthorityError."""
        reach = await self._nodes.reach()
        answer = await self._answer(list_call(self._settings), reach)
        found = dict[str, bytes]()
        for each in read_ids(answer.http.body):
            if published := await self._list(each, reach):
                found[each] = published
        self._listing = set(found)
        certificates = [self._issuers.get(each) or await self._issuer(each, reach) for each in found]
        return AdvertisedLists(tuple(found.values()), b"\n".join(certificates))

    async def _list(self, issuer: str, reach: VaultReach) -> bytes:
        """An issuer's list in PEM; empty where it has none."""
        call = crl_call(self._settings, issuer)
        answer = await self._nodes.ask(call, reach)
        status = answer.http.status
        if status == 200:
            return answer.http.body
        if status == DELETED or (status == WITHOUT_KEY and issuer not in self._listing):
            return b""
        raise not_listed(self._nodes.refusal(answer, call), self._settings)

    async def _signed(self, request: IssueRequest, reach: VaultReach) -> VaultSigned:
        token = await self._session.token(reach)
        answer = await self._sign(request, token, reach)
        if self._is_unknown(answer):
            fresh = await self._session.token(reach, unknown=token)
            if fresh.text != token.text:
                token, answer = fresh, await self._sign(request, fresh, reach)
        if answer.http.status != 200:
            call = sign_call(self._settings, request, token)
            raise not_signed(self._nodes.refusal(answer, call), self._settings, str(request.identity))
        return read_signed(answer.http.body, token)

    async def _sign(self, request: IssueRequest, token: Token, reach: VaultReach) -> NodeAnswer:
        return await self._nodes.ask(sign_call(self._settings, request, token), reach)

    def _is_unknown(self, answer: NodeAnswer) -> bool:
        """Whether the server does not know the token, which a new login cures; it does not cure a policy's denial."""
        refusal = self._nodes.refusal(answer, VaultCall(""))
        return refusal.status == 403 and not is_policys_denial(refusal.words)

    def _is_new(self, issuer: bytes) -> bool:
        """Whether an issuer signed that was not there when the issuers were read: the CA was rotated in between."""
        return self._settings.roots_file is None and bool(issuer) and issuer not in self._issuers.values()

    async def _anchors(self, reach: VaultReach) -> bytes:
        if self._settings.roots_file is not None:
            self._known = await self._operator.trust_roots(self._settings.roots_file)
            return self._known
        number = self._questions.ask()
        answer = await self._answer(list_call(self._settings), reach)
        if self._questions.counts(number):
            self._ids = tuple(read_ids(answer.http.body))
        ids: tuple[str, ...] | None = None
        while ids != self._ids:  # others may be told of meanwhile
            ids = self._ids
            self._issuers = {each: pem for each, pem in self._issuers.items() if each in ids}
            for each in ids:
                if each not in self._issuers and (pem := await self._issuer(each, reach)):
                    self._issuers[each] = pem  # at once: the next attempt goes on where a busy server ends this one
        issuers = {each: pem for each, pem in self._issuers.items() if each in self._ids}
        try:
            bundle = read_bundle(b"\n".join(issuers.values()))
        except CertificateError as error:
            message = f"the issuers that {answer.what} names cannot be read: {error}; read them: vault list issuers"
            raise AuthorityError(ErrorKind.INVALID, message) from error
        roots = [each for each in bundle.certificates if is_self_signed(each)]
        if not roots:
            raise no_roots(answer.what, self._settings, len(issuers))
        self._known = write_beside(roots, bundle.unread.values())
        return self._known

    async def _issuer(self, issuer: str, reach: VaultReach) -> bytes:
        """An issuer's certificate in PEM; empty where it was deleted since the list was read."""
        call = issuer_call(self._settings, issuer)
        answer = await self._nodes.ask(call, reach)
        if answer.http.status == DELETED:
            return b""
        if answer.http.status != 200:
            raise not_listed(self._nodes.refusal(answer, call), self._settings)
        return read_issuer(answer.http.body)

    async def _answer(self, call: VaultCall, reach: VaultReach) -> NodeAnswer:
        answer = await self._nodes.ask(call, reach)
        if answer.http.status != 200:
            raise not_listed(self._nodes.refusal(answer, call), self._settings)
        return answer
