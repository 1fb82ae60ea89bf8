"""Criteria without positives: (V, N, D) embeddings in, a loss and its terms out."""
