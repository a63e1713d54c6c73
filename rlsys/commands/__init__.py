"""One file for each subcommand of `rlsys`; only `cli` imports them."""
