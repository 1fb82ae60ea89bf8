"""Take a vision encoder you already have, improve it with a handful of epochs of E2MC, prove it, publish it."""
