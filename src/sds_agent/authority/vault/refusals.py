"""What a failure of Vault's means: who has to act, and the command that fixes it. No I/O.

The status alone says little. 400 is an unknown role, what a role forbids, a TTL past the issuer's end, and every login
that fails; 403 is an unknown token, a policy's denial and, without a token, a mount that is not there; 500 may be a
certificate that cannot log in. The server's words tell these apart.
"""

import re
from collections.abc import Callable

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from msgspec import Struct

from sds_agent.authority.answers import status_and
from sds_agent.authority.http_message import is_passing
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.authority.vault.settings import (
    VaultAppRoleAuth,
    VaultAuth,
    VaultCertAuth,
    VaultJwtAuth,
    VaultKubernetesAuth,
    VaultSettings,
    VaultTokenAuth,
)
from sds_agent.authority.vault.wire import is_policys_denial
from sds_agent.pki.certificates import CertificateError, extended_key_usages, read_pem, san_values

_NOT_SERVING = frozenset({307, 308, 412, 472, 473, 502, 503, 504})
_NO_LEADER = "active cluster node not found"
"""What a node says, with 500, while its cluster has no leader or has not named it yet."""
_INTERNAL_ERROR = 500


class VaultRefusal(Struct, frozen=True):
    """An answer that is no success: its status, the server's words (one short line) and the delay that it asks for.

    `what` is the server for messages, such as "Vault at https://vault.example:8200".
    """

    what: str
    status: int
    words: str
    retry_after: float | None = None

    def error(self, kind: ErrorKind, deed: str, fix: str) -> AuthorityError:
        """The error of this kind. `deed` is what the server did not do, such as "sign"."""
        said = status_and(self.words, self.status)
        return AuthorityError(kind, f"{self.what} did not {deed} ({said}); {fix}", retry_after=self.retry_after)


def not_signed(refusal: VaultRefusal, chosen: VaultSettings, identity: str) -> AuthorityError:
    """The error for a refused request of a certificate."""
    if refusal.status == 403:
        if is_policys_denial(refusal.words):
            return refusal.error(ErrorKind.DENIED, "sign", policy_fix(chosen))
        return refusal.error(ErrorKind.UNAUTHENTICATED, "sign", _token_fix(chosen))
    for pattern, kind, fix in _SIGNING:
        if found := re.search(pattern, refusal.words):
            return refusal.error(kind, "sign", fix(chosen, identity, found))
    return _otherwise(refusal, "sign", chosen)


def not_logged_in(refusal: VaultRefusal, chosen: VaultSettings) -> AuthorityError:
    """The error for a refused login: credentials that the server refuses, whatever the status, or a server in need."""
    auth = chosen.auth
    mount = getattr(auth, "mount", "")
    if refusal.status == 403:
        fix = (
            f"it also says so where no auth method is enabled at {mount}: check auth.mount"
            f"{_and_namespace(chosen)}, and {_login_fix(auth)}"
        )
        return refusal.error(ErrorKind.UNAUTHENTICATED, "log the agent in", fix)
    if "missing name in alias" in refusal.words:
        fix = (
            "the client certificate has no common name, as SPIFFE certificates have none, and the auth method cert "
            "names the caller by it: use a certificate with a common name, or another auth.type"
        )
        return refusal.error(ErrorKind.UNAUTHENTICATED, "log the agent in", fix)
    if refusal.status == 400 or _credentials_at_fault(refusal, auth):
        return refusal.error(ErrorKind.UNAUTHENTICATED, "log the agent in", _login_fix(auth))
    return _otherwise(refusal, "log the agent in", chosen)


def not_listed(refusal: VaultRefusal, chosen: VaultSettings) -> AuthorityError:
    """The error for issuers that cannot be read, which takes no token: 403 then means that there is no such mount."""
    deed = "name its issuers"
    if refusal.status == 404 and not refusal.words:
        make = _command(chosen, "write", "root/generate/internal", 'common_name="Root"')
        return refusal.error(ErrorKind.INVALID, deed, f"the mount has no issuer yet; make one: {make}")
    if refusal.status == 403:
        fix = f"no PKI engine is mounted at {chosen.mount}: check mount{_and_namespace(chosen)}"
        return refusal.error(ErrorKind.INVALID, deed, fix)
    return _otherwise(refusal, deed, chosen)


class TokenRefusedError(AuthorityError):
    """The server does not renew this token, or does not say how long it lasts: asking again is of no use."""


def not_renewed(refusal: VaultRefusal, chosen: VaultSettings) -> AuthorityError:
    """The error for a token that was not renewed, or not looked up."""
    if refusal.status not in {400, 403}:
        return _otherwise(refusal, "renew the token", chosen)
    if is_policys_denial(refusal.words):
        fix = "let a policy of the token allow auth/token/renew-self and auth/token/lookup-self, as default does"
    else:
        fix = "it ends with its lease"
    error = refusal.error(ErrorKind.UNAUTHENTICATED, "renew the token", fix)
    return TokenRefusedError(error.kind, str(error))


def serves(refusal: VaultRefusal) -> bool:
    """Whether a node that gave this answer serves at all. Where it does not, another one of its cluster may."""
    return refusal.status not in _NOT_SERVING and _NO_LEADER not in refusal.words


def not_serving(refusal: VaultRefusal) -> AuthorityError:
    """The error for a node that does not serve now: sealed, a standby, or behind the others."""
    fixes = {
        500: "its cluster has no leader at present: check the other nodes",
        412: "this node has not caught up with its cluster yet",
        472: "it is a secondary of disaster recovery: name the primary cluster in url",
        473: "it is a performance standby: name the active node in url too",
        503: "unseal it (vault operator unseal), or name the other nodes of its cluster in url",
    }
    return refusal.error(ErrorKind.TRANSIENT, "serve", fixes.get(refusal.status, "read its own log"))


def leads_elsewhere(what: str, location: str) -> AuthorityError:
    """The error for a redirect to a server that the configuration does not name."""
    return AuthorityError(
        ErrorKind.TRANSIENT,
        f"{what} is a standby and sends the agent to {location or 'an unnamed place'}, which gets no token as url does "
        "not name it; add it there if it is a node of this cluster",
    )


def no_roots(what: str, chosen: VaultSettings, issuers: int) -> AuthorityError:
    """The error for a mount whose issuers are all intermediates."""
    return AuthorityError(
        ErrorKind.INVALID,
        f"none of the {issuers} issuers at {chosen.mount} of {what} is self-signed, so none is a root of the trust "
        f"domain; name the root's file in roots_file, or import the root: "
        f"{_command(chosen, 'write', 'issuers/import/cert', 'pem_bundle=@root.pem')}",
    )


def fault_of(chain: bytes, chosen: VaultSettings, identity: str) -> AuthorityError | None:
    """What a role did to a certificate that makes it useless, where a command fixes it. What else is wrong with the
    certificate, the caller finds.
    """
    try:
        leaf = read_pem(chain)[0]
    except (CertificateError, IndexError):
        return None
    names = san_values(leaf)
    if not any(isinstance(name, x509.UniformResourceIdentifier) and name.value == identity for name in names):
        fix = _command(chosen, "patch", f"roles/{chosen.role}", f'allowed_uri_sans="{identity}" use_csr_sans=true')
        return AuthorityError(
            ErrorKind.MISMATCH,
            f"the role {chosen.role} at {chosen.mount} signed a certificate without the URI {identity}; fix the role: "
            f"{fix}",
        )
    missing = [f"{flag}=true" for flag, usage in _FLAGS.items() if usage not in extended_key_usages(leaf)]
    if missing:
        return AuthorityError(
            ErrorKind.MISMATCH,
            f"the role {chosen.role} at {chosen.mount} signs certificates that do not serve both servers and clients; "
            f"fix the role: {_command(chosen, 'patch', f'roles/{chosen.role}', *missing)}",
        )
    return None


_FLAGS = {"server_flag": ExtendedKeyUsageOID.SERVER_AUTH, "client_flag": ExtendedKeyUsageOID.CLIENT_AUTH}


def policy_fix(chosen: VaultSettings) -> str:
    """How to let the agent's token sign."""
    namespace = f" -namespace={chosen.namespace}" if chosen.namespace else ""
    rule = f'path "{chosen.mount}/sign/{chosen.role}" {{ capabilities = ["update"] }}'
    return (
        f"no policy of the token allows this: give {_bearer(chosen.auth)} the policy that this makes: "
        f"echo '{rule}' | vault policy write{namespace} sds-agent-{chosen.role} -"
    )


def _bearer(auth: VaultAuth) -> str:
    if isinstance(auth, VaultTokenAuth):
        return "a new token"
    return f"the role that logs the agent in at auth/{getattr(auth, 'mount', '')}, as one of its token_policies,"


def _token_fix(chosen: VaultSettings) -> str:
    if isinstance(chosen.auth, VaultTokenAuth):
        return (
            f"the token in {chosen.auth.token_file} has ended, was revoked, or is for another server or namespace: put "
            "a new one there"
        )
    namespace = f"namespace ({chosen.namespace})" if chosen.namespace else "namespace"
    return f"it does not know the token that it gave at the login: check mount and {namespace}"


def _and_namespace(chosen: VaultSettings) -> str:
    return f" and namespace ({chosen.namespace})" if chosen.namespace else ""


def _login_fix(auth: VaultAuth) -> str:
    match auth:
        case VaultKubernetesAuth():
            return (
                f"check that the role {auth.role} binds the service account and namespace of the token in "
                f"{auth.jwt_file}, and its audience, and that Kubernetes' API answers to the server's TokenReview"
            )
        case VaultJwtAuth():
            return f"check the audience, issuer and age of the token in {auth.jwt_file}, and auth.role"
        case VaultAppRoleAuth():
            return (
                "check auth.role_id, and put a new secret ID into auth.secret_id_file "
                f"(vault write -f -field=secret_id auth/{auth.mount}/role/ROLE/secret-id)"
            )
        case VaultCertAuth():
            return (
                "check that the certificate in certificate_file is valid, that its CA is in the auth method's role "
                f"(vault read auth/{auth.mount}/certs/{auth.role or 'ROLE'}), and auth.role"
            )
    return "put a new token into auth.token_file"


def _credentials_at_fault(refusal: VaultRefusal, auth: VaultAuth) -> bool:
    """Whether a 500 is about what the agent showed. A certificate that is out of date, and a role ID that is missing or
    a JWT of another form, give 500.
    """
    if refusal.status != _INTERNAL_ERROR:
        return False
    if isinstance(auth, VaultCertAuth):
        return "certificate" in refusal.words
    return "missing role_id" in refusal.words or "decoding failed" in refusal.words


def _otherwise(refusal: VaultRefusal, deed: str, chosen: VaultSettings) -> AuthorityError:
    """What a status means whatever was asked for."""
    if not serves(refusal):
        return not_serving(refusal)
    if refusal.status == 429:
        return refusal.error(
            ErrorKind.THROTTLED, deed, "its quota is used up (vault read sys/quotas/rate-limit); it is asked later"
        )
    if is_passing(refusal.status):
        return refusal.error(ErrorKind.TRANSIENT, deed, "read its own log")
    if refusal.status == 404:
        fix = f"check mount ({chosen.mount}){_and_namespace(chosen)}: vault secrets list"
        return refusal.error(ErrorKind.INVALID, deed, fix)
    return refusal.error(
        ErrorKind.INVALID, deed, f"check url, mount and role{_and_namespace(chosen)}, and read its log"
    )


def _command(chosen: VaultSettings, verb: str, path: str, *arguments: str) -> str:
    """A command of the `vault` program, which OpenBao calls `bao`."""
    namespace = [f"-namespace={chosen.namespace}"] if chosen.namespace else []
    return " ".join(["vault", verb, *namespace, f"{chosen.mount}/{path}", *arguments])


def _patched(chosen: VaultSettings, *arguments: str) -> str:
    return f"fix the role: {_command(chosen, 'patch', f'roles/{chosen.role}', *arguments)}"


def _unknown_role(chosen: VaultSettings, identity: str, _found: re.Match[str]) -> str:
    wanted = (f'allowed_uri_sans="{identity}"', "require_cn=false", "key_type=any", "max_ttl=24h")
    return f"make the role: {_command(chosen, 'write', f'roles/{chosen.role}', *wanted)}"


def _key_type(chosen: VaultSettings, _identity: str, _found: re.Match[str]) -> str:
    return f"give the workload that kind of key, or {_patched(chosen, 'key_type=any')}"


def _key_bits(chosen: VaultSettings, _identity: str, found: re.Match[str]) -> str:
    return f"give the workload a longer key, or {_patched(chosen, f'key_bits={found[1]}')}"


def _no_uris(chosen: VaultSettings, identity: str, _found: re.Match[str]) -> str:
    return _patched(chosen, f'allowed_uri_sans="{identity}"')


def _other_uris(chosen: VaultSettings, identity: str, _found: re.Match[str]) -> str:
    patch = _patched(chosen, f'allowed_uri_sans="{identity}"')
    return f"with all other identities that it is for, as the list is replaced, {patch}"


def _common_name(chosen: VaultSettings, _identity: str, _found: re.Match[str]) -> str:
    return _patched(chosen, "require_cn=false")


def _past_the_end(chosen: VaultSettings, _identity: str, _found: re.Match[str]) -> str:
    truncate = _command(chosen, "patch", "issuer/default", "leaf_not_after_behavior=truncate")
    return f"shorten the workload's ttl, renew the issuer, or let it shorten certificates: {truncate}"


def _no_issuer(chosen: VaultSettings, _identity: str, _found: re.Match[str]) -> str:
    choose = _command(chosen, "write", "config/issuers", "default=ID")
    return f"choose the default issuer, by its ID from {_command(chosen, 'list', 'issuers')}: {choose}"


def _no_key(chosen: VaultSettings, _identity: str, _found: re.Match[str]) -> str:
    choose = _command(chosen, "patch", f"roles/{chosen.role}", "issuer_ref=ID")
    return f"the role's issuer has no private key here, such as an imported root: choose another one: {choose}"


_SIGNING: tuple[tuple[str, ErrorKind, Callable[[VaultSettings, str, re.Match[str]], str]], ...] = (
    ("unknown role", ErrorKind.INVALID, _unknown_role),
    ("role requires keys of type", ErrorKind.DENIED, _key_type),
    (r"minimum of a \d+-bit key, but CSR's key is (\d+) bits", ErrorKind.DENIED, _key_bits),
    ("common_name field is required", ErrorKind.DENIED, _common_name),
    ("URI Subject Alternative Names are not allowed", ErrorKind.DENIED, _no_uris),
    ("URI Subject Alternative Names were provided .* not valid for this role", ErrorKind.DENIED, _other_uris),
    ("beyond the expiration of the CA certificate", ErrorKind.DENIED, _past_the_end),
    ("no default issuer currently configured", ErrorKind.INVALID, _no_issuer),
    ("unable to use this issuer for signing", ErrorKind.INVALID, _no_key),
)
"""What a role or an issuer forbids, in the words of OpenBao's and Vault's sources. A missing issuer gives 500."""
