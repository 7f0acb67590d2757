"""CFSSL's API server: certificates by a signing profile, with an HMAC key or without."""
