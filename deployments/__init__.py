"""Ray Serve around everything else: the only package that imports ray."""
