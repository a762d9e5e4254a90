"""Settings of all tiers."""

import gc

from hypothesis import settings

# A machine under load is slow, and slowness is no failure.
settings.register_profile("impetus", deadline=None)
settings.load_profile("impetus")


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: closing an engine makes a whole one."""
    gc.collect()
    gc.freeze()
