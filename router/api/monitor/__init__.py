"""The routes about the server itself: its log, charts and heat."""
