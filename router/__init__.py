"""The HTTP side: OpenAI requests in, events out; knows no Ray and no runtime."""
