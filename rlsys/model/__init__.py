"""What is known of a model from the files of its folder, without loading it."""
