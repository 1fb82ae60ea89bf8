"""Backbones of timm and transformers, and the model that is trained."""
