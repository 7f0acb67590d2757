"""X.509 as values: keys, requests, certificates, the walk that checks a chain, and the signer. No I/O, no clock."""
