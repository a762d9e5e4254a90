"""Events from a replica to the router."""
