"""A node-local agent that gives every Envoy on a machine its mTLS identity over SDS and keeps it fresh."""

__version__ = "0.1.0"
