"""Studies: the search for a plan's best values over runs of the federation itself."""
