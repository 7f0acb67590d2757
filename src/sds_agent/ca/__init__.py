"""Our own CA: its hierarchy on disk, who may ask it, and the gRPC service that signs."""
