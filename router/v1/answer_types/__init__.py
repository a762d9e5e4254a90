"""Types that describe the answers of the inference APIs; answers are not built from them."""
