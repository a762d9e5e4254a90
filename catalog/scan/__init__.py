"""Finding and inspecting model files."""
