"""Reads the roots of a signer from where the operator says they are: a ClusterTrustBundle, a ConfigMap or a file."""

from sds_agent.authority.kubernetes.api import KubernetesApi, server
from sds_agent.authority.kubernetes.settings import KubernetesSettings
from sds_agent.authority.kubernetes.trust_wire import RootsPlace, absent, not_served, read_roots, roots_places
from sds_agent.authority.kubernetes.wire import is_missing
from sds_agent.authority.operator_files import OperatorFiles


class SignerRoots:
    """The roots of one authority's signer, which the API tells in no answer to a request."""

    def __init__(self, settings: KubernetesSettings, api: KubernetesApi) -> None:
        self._settings = settings
        self._api = api
        self._operator = OperatorFiles()

    async def read(self) -> bytes:
        """All of them at present, in PEM. Raises AuthorityError."""
        if self._settings.roots_file is not None:
            return await self._operator.trust_roots(self._settings.roots_file)
        places = roots_places(self._settings)
        for place in places:
            if (found := await self._at(place)) is not None:
                return found
        raise await self._api.unless_starting(not_served(places))

    async def _at(self, place: RootsPlace) -> bytes | None:
        """The roots at one place; None where this API server does not serve the resource in that version."""
        answer = await self._api.send("GET", place.path)
        if answer.status == 200:
            return read_roots(place, answer, server(answer))
        if answer.status == 404:
            if is_missing(answer):
                raise absent(place)
            return None
        raise await self._api.refusal(answer, place.resource, place.verb)
