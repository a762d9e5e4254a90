"""The process of long jobs."""
