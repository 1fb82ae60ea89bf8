"""What leaves the house: the encoder as a folder others can load."""
