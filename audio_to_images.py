"""Turns a folder of recordings into a dataset of mel spectrograms."""
