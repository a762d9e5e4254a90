"""One file per model format behind one interface."""
