"""apple-fm-sdk's own Python code over stand-in bindings, for machines without macOS 26."""
