"""Reports of evaluations: documents, figures and curves."""
