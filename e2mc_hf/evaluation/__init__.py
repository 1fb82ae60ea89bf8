"""Frozen features judged: plain numbers out."""
