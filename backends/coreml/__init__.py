"""Core ML models on coremltools or the reference interpreter."""
