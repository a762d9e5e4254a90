"""HTTP below the APIs: protocol, guards, errors."""
