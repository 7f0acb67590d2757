"""CAs that sign in this process: what a signer needs around it, where one is kept, and how a change there is followed.

Both the agent (its embedded CA, and one that is plugged in) and the CA server sign with these; `authority` and `ca` say
for whom.
"""
