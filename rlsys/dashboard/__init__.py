"""The local page of `rlsys dashboard`: it reads what runs wrote, and changes nothing."""
