"""The gRPC services: they authenticate, check and hand over to the engine; they hold no round state."""
