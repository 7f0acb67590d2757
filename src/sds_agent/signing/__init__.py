"""CAs that sign in this process, for the agent's authorities and for the CA server alike.

`signer` builds certificates; a `signing_set` is a signer with what goes out beside its leaves. Two CAs provide one:
`self_signed` makes and renews a root of its own, `plugged` follows a directory that an operator fills. `directory`
reads such a directory, `cacerts` judges its files, `reach` proves for which trust domains they can issue, `istiod` and
`description` say more about them to people, and `hierarchy` makes them. Whom to sign for is decided above: the agent
signs for its own workloads, the CA server for callers that it has authenticated.
"""
