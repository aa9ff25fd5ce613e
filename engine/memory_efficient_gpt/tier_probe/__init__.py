"""What the tier decision is made of: a small clone of the architecture, run packed and plain."""
