"""One file for each subcommand, and helpers named after it; only `cli` imports them."""
