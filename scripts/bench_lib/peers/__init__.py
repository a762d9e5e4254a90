"""What the server is measured against: other servers, bare loops, a busy neighbour."""
