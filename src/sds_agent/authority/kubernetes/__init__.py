"""Signers behind the API of Kubernetes: by its own CertificateSigningRequest, or cert-manager's CertificateRequest."""
