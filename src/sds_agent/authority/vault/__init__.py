"""HashiCorp Vault and OpenBao as an upstream CA: their PKI secrets engine, which signs by a role."""
