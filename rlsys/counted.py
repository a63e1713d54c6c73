"""Numbers with what they count."""


def counted(number: int, noun: str) -> str:
    """As in "1 prompt" or "1,200 prompts"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
