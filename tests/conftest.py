"""Settings of all tiers."""

from hypothesis import settings

# A machine under load is slow, and slowness is no failure.
settings.register_profile("impetus", deadline=None)
settings.load_profile("impetus")
