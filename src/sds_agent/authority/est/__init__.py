"""CAs that speak EST, Enrollment over Secure Transport (RFC 7030)."""
