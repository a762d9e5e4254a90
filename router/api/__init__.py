"""The management API: model settings, loading and unloading, decisions, drain."""
