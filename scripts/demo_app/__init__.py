"""The demonstration: one agent, two Envoys, mutual TLS between them, certificates that live 20 seconds."""
