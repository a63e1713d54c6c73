"""The reward functions that rlsys brings, one file for each family."""
