"""A2C on environments of Gymnasium, which the user brings along."""
