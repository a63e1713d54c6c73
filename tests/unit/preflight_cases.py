"""What the tests of preflight share."""

import json


def only(found):
    assert len(found) == 1, found
    return found[0].text


def rows(path, *columns, copies=20):
    """A file with a row for each of `columns`, beside a prompt, so often each."""
    lines = [json.dumps({"prompt": "1 + 1?"} | own) + "\n" for own in columns]
    path.write_text("".join(line * copies for line in lines))
    return str(path)
