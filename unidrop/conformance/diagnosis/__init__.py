"""What is wrong with a mask or an output: a model of the stream, its mutations, and a search."""
