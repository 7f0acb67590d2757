"""Whether Envoy would take a certificate: path building and validation (RFC 5280 section 6), revocation beside it.

The adversary is whoever can put a certificate into what is judged: a CA whose answer the agent checks before it serves
it, a caller of the CA server who renews with a certificate of its own, an operator's directory that somebody else has
filled. None of them may get anything taken that a real Envoy would refuse: the agent would serve it, and every
handshake would fail. Nor may they make the judge work without bound, or end with an error that is not a verdict.

The judge to agree with is Envoy (BoringSSL), from 1.36 to 1.40: what it takes is taken and what it refuses is refused,
held against real Envoys chain by chain in `tests/e2e/test_walk_beside_envoy.py`. Where several Envoys may choose
differently, as among anchors of one name, only what is good for each of them is good. Where this is stricter than all
of them, the rule says why at its place.

`path` walks, `rules` judge one certificate in its place, `choice` says which anchors an Envoy would pick, `constraints`
and `policies` are RFC 5280's names and policies, `signatures` one signature, and `revocation` the lists (section 5).
"""
