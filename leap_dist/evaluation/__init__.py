"""Evaluation: fresh learners are trained from several initializations, and compared."""
