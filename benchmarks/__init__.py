"""What dbgate costs, measured beside its peers: `make bench`."""
