"""Transfer evaluation: fresh learners from each initialization, compared."""
