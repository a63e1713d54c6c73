"""Running code that nobody trusts: model output, and calls that may never end."""
