"""Apple's Foundation Models."""
