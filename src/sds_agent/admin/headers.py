"""The headers of the admin server's answers: a browser shows, runs and keeps nothing of them but the page."""

EVERY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Those of every answer, also of one that no application has made."""
POLICY = "Content-Security-Policy"
NOTHING = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""The Content-Security-Policy of everything that is no page."""


def raw(policy: str | None = None) -> list[tuple[bytes, bytes]]:
    """Those of every answer as ASGI has them, and the policy if one is given."""
    named = EVERY if policy is None else {**EVERY, POLICY: policy}
    return [(name.lower().encode(), value.encode()) for name, value in named.items()]
