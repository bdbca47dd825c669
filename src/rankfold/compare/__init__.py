"""Contenders trained on the same data under the same budget, measured alike, and reported: `rankfold compare`."""
