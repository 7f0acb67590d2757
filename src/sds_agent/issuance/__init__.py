"""When to ask a CA, what of its answer to accept, when to renew or retry, and the loop that does it."""
