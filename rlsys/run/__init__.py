"""What a run leaves in its folder, and what a later process continues from."""
