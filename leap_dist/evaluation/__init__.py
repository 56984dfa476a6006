"""Evaluation: train fresh learners from several initializations, and compare them."""
