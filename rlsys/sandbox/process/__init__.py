"""The scripts of the sandbox's helper process, which runs without rlsys; see sandbox_server.py."""
