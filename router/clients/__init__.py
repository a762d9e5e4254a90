"""Client programs that can be set up for this server: their files, texts and checks."""
