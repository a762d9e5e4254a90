"""Types, errors and settings that every other package uses; imports nothing of ours."""
