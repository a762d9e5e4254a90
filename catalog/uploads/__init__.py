"""Uploads and imports of models: names, chunks, quarantine, inspection, local folders."""
