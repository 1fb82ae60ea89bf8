"""Self-supervised objectives: heads, state and loss of one method in one file."""
