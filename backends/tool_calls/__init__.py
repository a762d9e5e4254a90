"""Tool calls in the forms that the model families write them: reading, checking, forcing."""
