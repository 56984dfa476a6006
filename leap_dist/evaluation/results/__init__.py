"""Results of evaluations, from the files of single runs to statistics."""
