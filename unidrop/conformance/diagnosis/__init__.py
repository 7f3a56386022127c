"""Explain a wrong mask or output: a model of the stream, mutations of it, and a search."""
