"""The parameter server: leases, validation, aggregation and recovery."""
