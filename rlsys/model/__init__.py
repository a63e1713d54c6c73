"""What is known about a model from the files of its folder, without loading it."""
