"""What an SDS socket serves, and what an Envoy has loaded, asked from outside and compared."""
