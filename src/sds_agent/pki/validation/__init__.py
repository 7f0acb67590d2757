"""Whether Envoy would take a certificate: path building and validation (RFC 5280 section 6), and revocation beside it.

**Threat model.** An attacker chooses the certificates that are judged here: a CA in its answer to the agent, a client
in what it shows to the CA server, someone who puts a file into the directory of a plugged-in CA. Three things hold all
the same. Nothing is accepted that was not issued, all the way down from an anchor, by CAs that may do so. The agent
serves no chain that an Envoy refuses, since every handshake with it would fail. And every input ends with a verdict,
after bounded work (`path.MOST_ATTEMPTS`, `choice.MOST_CHOICES` and `LONGEST`, `constraints.MOST_COMPARISONS`) and with
no other error. All certificates come from `certificates.read_bundle`, which has parsed them to their end and leaves out
what Envoy does not load.

**Whom it agrees with.** Envoy 1.36 to 1.40, which is BoringSSL: what it refuses is refused, and what it takes is taken.
`tests/e2e/test_walk_beside_envoy.py` puts some 1,400 odd chains to real Envoys. It lists, each with its reason, where
this is stricter (weak keys and hashes, anchors that are no CAs, chains that only some versions build) and where it is
milder (nowhere). It is stricter with chains through `choice.LONGEST` certificates too. Where versions of Envoy choose
differently, as among anchors of one name, only what is good for each of them is good. Of its callers the CA server asks
something else (`envoys=False`): whether a path to an anchor is valid, no matter which verifier would build it.

**What it leaves to others.** Revocation is judged for the CA server alone, and otherwise than Envoy judges it, as
`revocation` says. Whether a leaf is what was asked for is judged in `issuance.acceptance`.

`path` searches, `rules` judge one certificate in its place, `choice` says which chain an Envoy would build,
`constraints` and `policies` are RFC 5280's names and policies, `signatures` one signature, and `revocation` the lists
(section 5).
"""
