"""Apple's Foundation Models through apple-fm-sdk."""
