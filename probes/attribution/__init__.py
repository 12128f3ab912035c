"""AtP*: which heads, neurons and features matter, by gradients, corrected, verified and bounded (arXiv 2403.00745)."""
