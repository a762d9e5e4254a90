"""Memory scheduling decisions: pure functions, without clock or I/O."""
