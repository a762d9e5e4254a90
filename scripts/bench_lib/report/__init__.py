"""Statistics, and the pages and plots that show them."""
