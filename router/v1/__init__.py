"""The OpenAI API, and Anthropic's Messages."""
