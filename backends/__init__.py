"""Model formats behind one interface: a folder for each format, and folders that all share."""
