"""`rlsys dashboard RUN_OR_PARENT...`: a page that shows runs."""

from __future__ import annotations

import argparse
from contextlib import suppress

from rlsys.dashboard.server import serve


def main(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    with suppress(KeyboardInterrupt):  # the way to end it
        serve(
            args.places,
            host=args.host,
            port=args.port,
            with_token=args.token,
            open_browser=args.open,
        )
