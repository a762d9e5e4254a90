"""What the pages about the server itself show: its log, charts, heat and settings."""
