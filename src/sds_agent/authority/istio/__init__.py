"""Istio's certificate service as an upstream CA: istiod, cert-manager's istio-csr, or `sds-agent ca serve`."""
