"""What the gRPC servers of this package share."""
