"""Networks, flat parameter vectors and devices."""
