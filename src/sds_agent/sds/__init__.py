"""How secrets are served: Envoy's Secret Discovery Service, as pure sessions with a gRPC server around them."""
