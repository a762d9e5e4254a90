"""A local server that speaks the Hugging Face Hub's API: the test hub, `scripts/hub`."""
