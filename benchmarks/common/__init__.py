"""What every benchmark shares: methods, records of results, servers, and proof of which attention ran."""
