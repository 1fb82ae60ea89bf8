"""The Trainer, its arguments and its optimizers."""
