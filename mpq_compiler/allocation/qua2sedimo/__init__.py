"""Scores of formats by a predictor over the layer graph (Qua2SeDiMo, arXiv 2412.14628)."""
