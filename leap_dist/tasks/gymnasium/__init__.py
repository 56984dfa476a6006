"""A2C on Gymnasium environments that the user provides."""
