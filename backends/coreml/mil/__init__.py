"""A reference interpreter of MIL programs, for machines without Core ML."""
