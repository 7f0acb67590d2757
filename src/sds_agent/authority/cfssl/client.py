"""The client of CFSSL's API server.

`sign` or `authsign` gives a certificate, `info` CFSSL's own and what the profile gives, and `bundle` what is above it.
CFSSL knows no renewal and takes no lifetime: each certificate is a new request, and the profile decides.
"""

from datetime import timedelta

from cryptography import x509

from sds_agent.authority.cfssl import wire
from sds_agent.authority.cfssl.files import CfsslFiles, files_of
from sds_agent.authority.cfssl.settings import CfsslSettings
from sds_agent.authority.http_client import HttpAnswer, HttpsRequest, send
from sds_agent.authority.operator_files import OperatorFiles
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.clock import Clock
from sds_agent.pki.certificates import CertificateError, is_self_signed, read_pem


class CfsslAuthority:
    """Asks one CFSSL."""

    def __init__(self, settings: CfsslSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._what = f"CFSSL at {settings.url}"
        self._operator = OperatorFiles()
        self.refresh_every: timedelta = settings.refresh_every

    async def issue(self, request: IssueRequest) -> Issuance:
        """Ask once. Raises AuthorityError."""
        chosen, files = self._settings, await self._files()
        asked = wire.sign_request(request.csr_pem, chosen.profile, chosen.label, bundle=chosen.bundle)
        endpoint = "sign"
        if files.auth_key is not None:
            endpoint, asked = "authsign", wire.authenticated(asked, files.auth_key)
        signed, messages = await self._post(endpoint, asked, files, wire.CfsslSigned)
        leaf = _first(signed.certificate, endpoint)
        wire.check_san(leaf)
        info, as_default = await self._profile_info(files)
        wire.check_usages(leaf, chosen.profile, info, as_default=as_default)
        left = leaf.not_valid_after_utc - self._clock.now()
        differences = wire.warnings(leaf, chosen.profile, info, ttl=request.ttl, left=left, as_default=as_default)
        return Issuance(
            _chain(signed, info),
            await self._anchors(files, info, signed.bundle),
            (*(wire.said(each) for each in messages[: wire.MOST_MESSAGES]), *differences),
        )

    async def anchors(self) -> bytes:
        """The trust domain's roots at present. Raises AuthorityError."""
        files = await self._files()
        if files.anchors is not None:
            return files.anchors
        return await self._anchors(files, await self._info(files, self._settings.profile), None)

    async def _profile_info(self, files: CfsslFiles) -> tuple[wire.CfsslInfo | None, bool]:
        """What `info` says of the profile, and whether it says the same of the default one.

        With the roots in a file a server needs no `info`: what it would tell is missing in messages alone.
        """
        profile = self._settings.profile
        try:
            info = await self._info(files, profile)
            default = info if profile is None else await self._info(files, None)
        except AuthorityError:
            if files.anchors is None:
                raise
            return None, False
        return info, profile is not None and (info.usages, info.expiry) == (default.usages, default.expiry)

    async def _info(self, files: CfsslFiles, profile: str | None) -> wire.CfsslInfo:
        asked = wire.info_request(profile, self._settings.label)
        return (await self._post("info", asked, files, wire.CfsslInfo))[0]

    async def _anchors(self, files: CfsslFiles, info: wire.CfsslInfo | None, bundle: wire.CfsslBundle | None) -> bytes:
        """Those in the file; without one CFSSL's certificate if it is a root, or else the root of its bundle."""
        if files.anchors is not None or info is None:
            return files.anchors or b""
        if is_self_signed(_first(info.certificate, "info")):
            return info.certificate.encode()
        if not self._settings.bundle:
            raise AuthorityError(
                ErrorKind.INVALID,
                "CFSSL's certificate is an intermediate CA's, and info does not tell its root; name the root's file in "
                "roots_file, or turn bundle on",
            )
        if bundle is None:
            bundle = (await self._post("bundle", wire.bundle_request(info.certificate), files, wire.CfsslBundle))[0]
        if not bundle.root:
            raise AuthorityError(
                ErrorKind.INVALID,
                "CFSSL's bundle has no root; put it into the file of -ca-bundle, or name it in roots_file",
            )
        return bundle.root.encode()

    async def _post(
        self, endpoint: str, body: bytes, files: CfsslFiles, result: type[wire.T]
    ) -> tuple[wire.T, tuple[wire.CfsslMessage, ...]]:
        answer = await send(
            HttpsRequest(
                "POST",
                f"{self._settings.url}{wire.API}/{endpoint}",
                files.roots,
                body,
                {"content-type": "application/json"},
                self._settings.server_name,
                files.certificate,
            ),
            self._what,
        )
        if answer.status == 200:
            return wire.read_result(answer.body, result, endpoint)
        raise self._refused(answer, endpoint)

    def _refused(self, answer: HttpAnswer, endpoint: str) -> AuthorityError:
        error = wire.refused(answer.status, answer.body, endpoint)
        error.retry_after = answer.retry_after(self._clock.now())
        return error

    async def _files(self) -> CfsslFiles:
        return await self._operator.read("the files that the settings name", files_of, self._settings)


def _first(pem: str, endpoint: str) -> x509.Certificate:
    try:
        return read_pem(pem.encode())[0]
    except (CertificateError, IndexError) as error:
        message = f"CFSSL's answer to {endpoint} holds no certificate that can be read; check that url is CFSSL's"
        raise AuthorityError(ErrorKind.INVALID, message) from error


def _chain(signed: wire.CfsslSigned, info: wire.CfsslInfo | None) -> bytes:
    """The certificate, CFSSL's own, and what its bundle has between them."""
    parts = [signed.certificate, "" if info is None else info.certificate]
    if signed.bundle is not None:
        parts.append(signed.bundle.bundle)
    return "\n".join(parts).encode()
